//! How much memory there is, so that what would not fit is refused before it is tried.

use std::path::Path;

use moe_runner::{Error, Result};

use crate::report::units;

/// Bytes that this process may still allocate, as far as Linux tells: what the machine has left,
/// and what its control groups have left.
pub(crate) fn available() -> Option<usize> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let machine =
        line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)?;
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    Some(
        groups_left(Path::new("/sys/fs/cgroup"), &groups).map_or(machine, |left| left.min(machine)),
    )
}

/// What the control groups of `/proc/self/cgroup`, and those that they are in, have left: of version
/// 2, or of version 1's memory controller. A container may see its own group as the root.
fn groups_left(root: &Path, groups: &str) -> Option<usize> {
    let of_line = |line: &str| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let path = path.trim_start_matches('/');
        let (root, files, cache) = match controllers {
            "" => (root.to_owned(), ["memory.max", "memory.current"], "inactive_file "),
            v1 if v1.split(',').any(|controller| controller == "memory") => (
                root.join("memory"),
                ["memory.limit_in_bytes", "memory.usage_in_bytes"],
                "total_inactive_file ",
            ),
            _ => return None,
        };
        let group = root.join(path);
        group
            .ancestors()
            .take_while(|group| group.starts_with(&root))
            .filter_map(left(files, cache))
            .min()
    };
    groups.lines().filter_map(of_line).min()
}

/// The limit of a group less what it uses. What the system keeps of files that nobody has looked at
/// lately counts as used, but makes room when it is needed.
fn left([limit, used]: [&str; 2], cache: &str) -> impl Fn(&Path) -> Option<usize> {
    move |group| {
        let text = |file: &str| std::fs::read_to_string(group.join(file)).ok();
        let number = |file: &str| text(file)?.trim().parse::<usize>().ok();
        let stat = text("memory.stat").unwrap_or_default();
        let cached = stat.lines().find_map(|line| line.strip_prefix(cache)?.trim().parse().ok());
        let used = number(used)?.saturating_sub(cached.unwrap_or(0));
        Some(number(limit)?.saturating_sub(used))
    }
}

/// Refuses what needs more memory than there is.
pub(crate) fn ensure(bytes: usize, what: &str, instead: &str) -> Result<()> {
    if let Some(available) = available()
        && bytes > available
    {
        return Err(Error::input(
            "out of memory",
            format!(
                "{what} needs {}, and {} are available; {instead}",
                units::bytes(bytes),
                units::bytes(available)
            ),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_groups_of_both_versions() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let left = |groups: &str| groups_left(root.path(), groups);
        assert_eq!(left("0::/a/b\n"), None);
        // version 2: the group has no limit of its own, the one around it has
        write("a/b/memory.max", "max\n");
        write("a/b/memory.current", "100\n");
        write("a/memory.max", "1000\n");
        write("a/memory.current", "300\n");
        write("a/memory.stat", "anon 200\nactive_file 50\ninactive_file 50\n");
        assert_eq!(left("0::/a/b\n"), Some(750));
        assert_eq!(left("0::/elsewhere\n"), None);
        // in a container the group is the root, whatever it is called outside
        write("memory.max", "500\n");
        write("memory.current", "500\n");
        assert_eq!(left("0::/../outside\n"), Some(0));
        // version 1, beside an empty version 2
        write("memory/c/memory.limit_in_bytes", "4000\n");
        write("memory/c/memory.usage_in_bytes", "1500\n");
        write("memory/c/memory.stat", "total_inactive_file 500\n");
        write("memory/memory.limit_in_bytes", "9223372036854771712\n");
        write("memory/memory.usage_in_bytes", "1500\n");
        let groups = "5:cpu,cpuacct:/c\n4:hugetlb,memory:/c\n";
        assert_eq!(left(groups), Some(3000));
    }
}
