//! How many cores there are to use.

use std::collections::BTreeSet;
use std::fs;

/// How many physical cores the calling thread may use, at least one: the cores of its affinity
/// mask, where the hardware threads of one core count once, and no more than the CPU time that its
/// control group allows. Where the operating system does not tell cores from hardware threads
/// (not Linux, or `/sys` is hidden), hardware threads are counted.
pub fn physical_cores() -> usize {
    // Respects affinity and control groups, but counts hardware threads.
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    cores_in_affinity().map_or(threads, |cores| cores.min(threads))
}

/// The processors (hardware threads) that the calling thread may use, by the operating system's
/// numbers, in the order in which to use them: first one of each core. `None` where the operating
/// system does not tell (not Linux).
pub fn cpus() -> Option<Vec<usize>> {
    let mut cpus: Vec<(usize, usize, usize)> = Vec::new();
    for (cpu, core) in allowed()? {
        let before = cpus.iter().filter(|(_, other, _)| *other == core).count();
        cpus.push((before, core, cpu));
    }
    cpus.sort_unstable();
    Some(cpus.into_iter().map(|(.., cpu)| cpu).collect())
}

/// The distinct cores of the calling thread's affinity mask, from Linux's `/proc` and `/sys`.
fn cores_in_affinity() -> Option<usize> {
    let cores: BTreeSet<usize> = allowed()?.into_iter().map(|(_, core)| core).collect();
    (!cores.is_empty()).then_some(cores.len())
}

/// The processors of the calling thread's affinity mask, each with its core, which is named by its
/// first hardware thread.
fn allowed() -> Option<Vec<(usize, usize)>> {
    let status = fs::read_to_string("/proc/thread-self/status").ok()?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let core_of = |cpu: usize| {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        let siblings = fs::read_to_string(path).ok().and_then(|list| parse_cpu_list(&list));
        siblings.and_then(|siblings| siblings.first().copied()).unwrap_or(cpu)
    };
    Some(parse_cpu_list(list)?.into_iter().map(|cpu| (cpu, core_of(cpu))).collect())
}

/// CPU numbers in the kernel's list format, such as `0-3,8,10-11`.
fn parse_cpu_list(list: &str) -> Option<Vec<usize>> {
    // No machine has more; a longer range is not a CPU list.
    const MOST: usize = 1 << 16;
    let mut cpus = Vec::new();
    for range in list.trim().split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        if last >= MOST {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_cpu_list("0-3,8,10-11\n"), Some(vec![0, 1, 2, 3, 8, 10, 11]));
        assert_eq!(parse_cpu_list("\t5"), Some(vec![5]));
        assert_eq!(parse_cpu_list(""), Some(vec![]));
        assert_eq!(parse_cpu_list("3-"), None);
        assert_eq!(parse_cpu_list("0-4294967295"), None);
        assert_eq!(parse_cpu_list("x"), None);
    }

    #[test]
    fn cores_are_within_the_hardware_threads() {
        let threads = std::thread::available_parallelism().unwrap().get();
        assert!((1..=threads).contains(&physical_cores()));
        if let Some(cpus) = cpus() {
            let distinct: BTreeSet<usize> = cpus.iter().copied().collect();
            assert_eq!((distinct.len(), cpus.len() >= physical_cores()), (cpus.len(), true));
        }
    }
}
