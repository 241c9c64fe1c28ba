//! Main memory that this process may have: the machine's, its control group's (a container, a job of a
//! cluster), its own limits (`ulimit`).

use std::path::Path;

use crate::report::memory;

/// A limit, and who sets it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Limit {
    pub(super) bytes: u64,
    /// Begins "… has 8 GB".
    pub(super) of: &'static str,
}

/// The tightest limit; `None` where the system does not tell.
pub(super) fn total() -> Option<Limit> {
    let machine = memory::total_bytes().map(|bytes| Limit { bytes, of: "this machine has" });
    let group = group().map(|group| Limit { bytes: group.limit, of: "the control group has" });
    let limits = machine.into_iter().chain(group).chain(own());
    limits.min_by_key(|limit| limit.bytes)
}

/// What of it is free now.
pub(super) fn available() -> Option<u64> {
    let group = group().map(|group| group.free);
    memory::available_bytes().into_iter().chain(group).min()
}

#[cfg(target_os = "linux")]
fn own() -> impl Iterator<Item = Limit> {
    use rustix::process::{Resource, getrlimit};
    let limits = [(Resource::As, "ulimit -v allows"), (Resource::Data, "ulimit -d allows")];
    limits
        .into_iter()
        .filter_map(|(resource, of)| getrlimit(resource).current.map(|bytes| Limit { bytes, of }))
}

#[cfg(not(target_os = "linux"))]
fn own() -> impl Iterator<Item = Limit> {
    std::iter::empty()
}

/// What a control group and those around it leave.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Group {
    limit: u64,
    free: u64,
}

fn group() -> Option<Group> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    group_below(Path::new("/sys/fs/cgroup"), &groups)
}

/// Names of a version's files: the limit, the use, and the key of what is cache and can be dropped.
type Names = [&'static str; 3];
const VERSION_1: Names = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"];
const VERSION_2: Names = ["memory.max", "memory.current", "inactive_file"];

/// The tightest of the groups in `groups`, lines of `id:controllers:path`, mounted at `root`.
fn group_below(root: &Path, groups: &str) -> Option<Group> {
    let found = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let (root, names) = match controllers {
            "" => (root.to_owned(), VERSION_2),
            some if some.split(',').any(|one| one == "memory") => (root.join("memory"), VERSION_1),
            _ => return None,
        };
        let path = root.join(path.trim_start_matches('/'));
        // A container may see the host's path and its own group at the root.
        let around = path.ancestors().filter(|around| around.starts_with(&root));
        let groups = around.filter_map(|folder| read(folder, names));
        groups.reduce(|a, b| Group { limit: a.limit.min(b.limit), free: a.free.min(b.free) })
    });
    found.min_by_key(|group| group.limit)
}

fn read(folder: &Path, [limit, used, cache]: Names) -> Option<Group> {
    let text = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
    let number = |name: &str| text(name)?.trim().parse::<u64>().ok();
    // "max" is no number.
    let limit = number(limit)?;
    let stat = text("memory.stat").unwrap_or_default();
    let cached = stat.lines().find_map(|line| line.strip_prefix(cache)?.trim().parse().ok());
    let used = number(used).unwrap_or(0).saturating_sub(cached.unwrap_or(0));
    Some(Group { limit, free: limit.saturating_sub(used) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, name: &str, text: &str) {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn the_tightest_group_around_counts() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        write(root, "a/memory.max", "4000\n");
        write(root, "a/memory.current", "3000\n");
        write(root, "a/memory.stat", "anon 5\ninactive_file 1000\n");
        write(root, "a/b/memory.max", "max\n");
        write(root, "a/b/c/memory.max", "3500\n");
        let group = Group { limit: 3500, free: 2000 };
        assert_eq!(group_below(root, "0::/a/b/c\n"), Some(group));
        assert_eq!(group_below(root, "0::/a\n"), Some(Group { limit: 4000, free: 2000 }));
        assert_eq!(group_below(root, "0::/\n"), None);
    }

    #[test]
    fn version_one_and_a_path_of_the_host() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        write(root, "memory/memory.limit_in_bytes", "9000\n");
        write(root, "memory/memory.usage_in_bytes", "5000\n");
        write(root, "memory/memory.stat", "total_inactive_file 500\n");
        let lines = "11:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/docker/1\n";
        assert_eq!(group_below(root, lines), Some(Group { limit: 9000, free: 4500 }));
        assert_eq!(group_below(root, "4:memoryless:/\nnonsense\n"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_has_a_limit() {
        assert!(total().unwrap().bytes > 0 && available().unwrap() > 0);
    }
}
