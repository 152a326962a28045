//! A pod's `resolv.conf`, when the host says with an adapter what is in it.

use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;
use std::path::Path;

use super::error::NetworkError;

/// Search domains that a resolver looks at.
const MOST_DOMAINS: usize = 6;

/// Domains and servers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Names {
    search: Vec<String>,
    servers: Vec<IpAddr>,
}

impl Names {
    /// From two lists with commas between.
    pub(super) fn read(suffixes: &str, servers: &str) -> Result<Names, NetworkError> {
        let parts = |text: &str| -> Vec<String> {
            text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect()
        };
        let search = parts(suffixes);
        for domain in &search {
            let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            if domain.len() > 254 || !domain.chars().all(plain) {
                return Err(NetworkError::settings("DNSSuffix", format!("{domain:?} is no domain")));
            }
        }
        if search.len() > MOST_DOMAINS {
            let reason = format!("{} domains; a resolver searches {MOST_DOMAINS} at most", search.len());
            return Err(NetworkError::settings("DNSSuffix", reason));
        }
        let servers = parts(servers).into_iter().map(|text| {
            text.parse()
                .map_err(|_| NetworkError::settings("DNSServerList", format!("{text:?} is no IP address")))
        });
        Ok(Names { search, servers: servers.collect::<Result<_, _>>()? })
    }

    fn is_empty(&self) -> bool {
        self.search.is_empty() && self.servers.is_empty()
    }
}

/// Writes what the adapters of one pod say, in their order. Without any word of it the file stays as it is.
///
/// The file is written in place: containers have it bound over theirs.
pub(super) fn write<'a>(dir: &Path, all: impl Iterator<Item = &'a Names>) -> Result<(), NetworkError> {
    let mut together = Names::default();
    for names in all {
        for domain in &names.search {
            if !together.search.contains(domain) {
                together.search.push(domain.clone());
            }
        }
        for server in &names.servers {
            if !together.servers.contains(server) {
                together.servers.push(*server);
            }
        }
    }
    if together.is_empty() {
        return Ok(());
    }
    let mut text = String::new();
    if !together.search.is_empty() {
        let _ = writeln!(text, "search {}", together.search.join(" "));
    }
    for server in &together.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    let path = dir.join("resolv.conf");
    fs::write(&path, text).map_err(|source| NetworkError::Write { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_add_up_and_silence_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        fs::write(&path, "nameserver 192.0.2.9\n").unwrap();
        let none = Names::read("", "").unwrap();
        write(dir.path(), [&none].into_iter()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "nameserver 192.0.2.9\n");
        let one = Names::read("a.example, b.example", "10.0.0.10").unwrap();
        let two = Names::read("b.example", "10.0.0.10,fd00::10").unwrap();
        write(dir.path(), [&none, &one, &two].into_iter()).unwrap();
        let expected = "search a.example b.example\nnameserver 10.0.0.10\nnameserver fd00::10\n";
        assert_eq!(fs::read_to_string(&path).unwrap(), expected);
    }

    #[test]
    fn what_is_no_name_is_refused() {
        assert!(Names::read("a,b,c,d,e,f,g", "").unwrap_err().to_string().starts_with("DNSSuffix"));
        assert!(Names::read("a\nnameserver x", "").is_err());
        assert!(Names::read("", "10.0.0.1,dns").unwrap_err().to_string().starts_with("DNSServerList"));
    }
}
