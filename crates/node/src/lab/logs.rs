//! The lab's logs: shown from where they are, and kept when the lab goes.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{
    HostName, Layout,
    error::{FileContext, LabError},
    layout::HostLayout,
};

/// Below this many directories no log is looked for.
const DEPTH: usize = 6;

/// Prints the last `lines` of each log, each under its path.
pub(crate) fn print(layout: &Layout, host: Option<HostName>, lines: usize) -> Result<(), LabError> {
    let hosts = HostName::ALL.into_iter().filter(|name| host.is_none_or(|wanted| wanted == *name));
    let mut shown = 0;
    for host in hosts.map(|name| layout.host(name)) {
        for path in find(&host.logs()).into_iter().chain(find(&host.run().join("dunlin"))) {
            let bytes = fs::read(&path).file("read", &path)?;
            let text = String::from_utf8_lossy(&bytes);
            let all: Vec<&str> = text.lines().collect();
            println!("==> {} ({} lines)", path.display(), all.len());
            for line in &all[all.len().saturating_sub(lines)..] {
                println!("{line}");
            }
            shown += 1;
        }
    }
    if shown == 0 {
        println!("no logs in {}", layout.dir().display());
    }
    Ok(())
}

/// Copies the sandboxes' logs, which lie beside their sockets, to where logs stay.
pub(crate) fn keep(host: &HostLayout) -> Result<(), LabError> {
    let state = host.run().join("dunlin");
    for path in find(&state) {
        let Ok(relative) = path.strip_prefix(&state) else { continue };
        let target = host.logs().join("sandboxes").join(relative);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).file("create", parent)?;
        }
        fs::copy(&path, &target).file("copy", path)?;
    }
    Ok(())
}

/// The `*.log` files below `directory`, in order.
fn find(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    visit(directory, DEPTH, &mut found);
    found.sort();
    found
}

fn visit(directory: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && depth > 0 => visit(&path, depth - 1, found),
            Ok(kind) if kind.is_file() && path.extension().is_some_and(|end| end == "log") => {
                found.push(path)
            }
            Ok(_) | Err(_) => {}
        }
    }
}
