//! The command line that containerd gives a shim (Go's flag style: one dash or two).

use thiserror::Error;

/// What is asked of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    Start,
    Delete,
    /// The server itself; containerd never asks for it, `start` does.
    Serve,
    Version,
    /// What this runtime is, as a message for containerd.
    Info,
    Help,
}

/// The command line, read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Args {
    pub(crate) action: Option<Action>,
    pub(crate) namespace: String,
    pub(crate) id: String,
    /// containerd's gRPC socket.
    pub(crate) address: String,
    pub(crate) publish_binary: String,
    pub(crate) bundle: String,
    pub(crate) debug: bool,
}

/// The command line is not one that containerd gives.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum ArgsError {
    #[error("unknown option {0}; see --help")]
    Unknown(String),
    #[error("option {0} needs a value; see --help")]
    NoValue(String),
    #[error("unknown action {0:?}; a shim knows `start` and `delete`")]
    Action(String),
    #[error("no action given; this program is started by containerd, see --help")]
    NoAction,
    #[error("option -{0} is missing; containerd always gives it")]
    Missing(&'static str),
    #[error("-{0} {1:?} is not an id: it takes 1 to 76 letters, digits, '-', '_' and '.'")]
    Id(&'static str, String),
}

pub(crate) const HELP: &str = "\
containerd-shim-dunlin-v2: runs a container in a virtual machine that can move.

Started by containerd as the runtime io.containerd.dunlin.v2; put it on containerd's PATH.
  ctr run --runtime io.containerd.dunlin.v2 IMAGE ID

  -namespace NS -id ID -address SOCKET [-publish-binary PATH] [-bundle DIR] [-debug] start|delete
  -v, -version   print the version
  -info          print what this runtime is, as containerd's RuntimeInfo message
  -h, -help      print this

Configuration: the file named by DUNLIN_CONFIG, else /etc/dunlin/config.toml.
Log: shim.log in the sandbox's state directory (default /run/dunlin/NS/ID).
";

impl Args {
    pub(crate) fn parse(words: impl IntoIterator<Item = String>) -> Result<Args, ArgsError> {
        let mut args = Args::default();
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let Some(option) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                args.action = Some(match word.as_str() {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    "serve" => Action::Serve,
                    _ => return Err(ArgsError::Action(word)),
                });
                continue;
            };
            let (name, inline) = match option.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (option, None),
            };
            match name {
                "debug" => args.debug = true,
                "v" | "version" => args.action = Some(Action::Version),
                "info" => args.action = Some(Action::Info),
                "h" | "help" => args.action = Some(Action::Help),
                "namespace" | "id" | "address" | "publish-binary" | "bundle" | "socket" => {
                    let value =
                        inline.or_else(|| words.next()).ok_or_else(|| ArgsError::NoValue(word.clone()))?;
                    match name {
                        "namespace" => args.namespace = value,
                        "id" => args.id = value,
                        "address" => args.address = value,
                        "publish-binary" => args.publish_binary = value,
                        "bundle" => args.bundle = value,
                        // Older daemons pass it; the server inherits its socket instead.
                        _ => {}
                    }
                }
                _ => return Err(ArgsError::Unknown(word)),
            }
        }
        match args.action {
            None => return Err(ArgsError::NoAction),
            // `start` may learn its ids from standard input; see `bootstrap`.
            Some(Action::Version | Action::Help | Action::Info | Action::Start) => {}
            Some(Action::Delete | Action::Serve) => args.check_ids()?,
        }
        Ok(args)
    }

    /// Refuses ids that are missing or cannot be a directory's name.
    pub(crate) fn check_ids(&self) -> Result<(), ArgsError> {
        check_id("namespace", &self.namespace)?;
        check_id("id", &self.id)
    }
}

/// Ids become directory names: containerd's own rule is asked again here.
fn check_id(name: &'static str, value: &str) -> Result<(), ArgsError> {
    if value.is_empty() {
        return Err(ArgsError::Missing(name));
    }
    if !super::join::is_id(value) {
        return Err(ArgsError::Id(name, value.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, ArgsError> {
        Args::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn containerds_own_line_is_read() {
        let args = parse("-namespace default -address /a -publish-binary /b -id c1 start").unwrap();
        assert_eq!(args.action, Some(Action::Start));
        assert_eq!((args.namespace.as_str(), args.id.as_str()), ("default", "c1"));
        let args = parse("-namespace default --id=c1 -bundle /x -debug delete").unwrap();
        assert_eq!((args.action, args.debug), (Some(Action::Delete), true));
    }

    #[test]
    fn an_id_that_would_leave_the_directory_is_refused() {
        assert!(matches!(parse("-namespace default -id ../x delete"), Err(ArgsError::Id("id", _))));
        assert!(matches!(parse("-namespace .. -id x serve"), Err(ArgsError::Id("namespace", _))));
        assert_eq!(parse("-namespace default delete"), Err(ArgsError::Missing("id")));
        let start = parse("-namespace default -id ../x start").unwrap();
        assert!(matches!(start.check_ids(), Err(ArgsError::Id("id", _))));
    }
}
