//! What this CPU can do.
//!
//! An instruction set beyond the portable one is entered only with a token ([`Avx2`], [`Avx512`]),
//! and a token exists only if the CPU was asked and has every feature that the token lists. Nothing
//! here reads an environment variable: a program that wants a particular instruction set asks for
//! its [`Isa`] and is refused where the CPU lacks it.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;

/// The instruction sets that kernels are written for, in the order of preference: the greatest
/// available one is the fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust, on any CPU.
    Portable,
    /// x86-64 with AVX2, FMA and F16C (all of x86-64-v3).
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL (all of x86-64-v4).
    Avx512,
}

impl Isa {
    /// All instruction sets, whether this CPU has them or not, the least first.
    pub const ALL: [Isa; 3] = [Isa::Portable, Isa::Avx2, Isa::Avx512];

    /// The best instruction set of this CPU.
    pub fn detect() -> Isa {
        Isa::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Isa::Portable)
    }

    /// The instruction sets of this CPU, the least first; `Portable` is always among them.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// Whether this CPU has the instruction set.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            Isa::Avx2 => Avx2::new().is_some(),
            Isa::Avx512 => Avx512::new().is_some(),
        }
    }

    /// The name in reports: `portable`, `avx2`, `avx512`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Proof that this CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

impl Avx2 {
    /// The token, if the CPU has the features.
    pub fn new() -> Option<Avx2> {
        #[cfg(target_arch = "x86_64")]
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        #[cfg(not(target_arch = "x86_64"))]
        let has = false;
        has.then_some(Avx2(()))
    }
}

/// Proof that this CPU has AVX-512 F, BW, DQ and VL, and everything that [`Avx2`] stands for.
#[derive(Clone, Copy, Debug)]
pub struct Avx512(());

impl Avx512 {
    /// The token, if the CPU has the features.
    pub fn new() -> Option<Avx512> {
        Avx2::new()?;
        #[cfg(target_arch = "x86_64")]
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        #[cfg(not(target_arch = "x86_64"))]
        let has = false;
        has.then_some(Avx512(()))
    }
}

/// How many physical cores the calling thread may use, at least one: the cores of its affinity
/// mask, where the hardware threads of one core count once, and no more than the CPU time that its
/// control group allows. Where the operating system does not tell cores from hardware threads
/// (not Linux, or `/sys` is hidden), hardware threads are counted.
pub fn physical_cores() -> usize {
    // Respects affinity and control groups, but counts hardware threads.
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    cores_in_affinity().map_or(threads, |cores| cores.min(threads))
}

/// The distinct cores of the calling thread's affinity mask, from Linux's `/proc` and `/sys`.
fn cores_in_affinity() -> Option<usize> {
    let status = fs::read_to_string("/proc/thread-self/status").ok()?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let core_of = |cpu: usize| {
        // A core is named by its first hardware thread.
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        let siblings = fs::read_to_string(path).ok().and_then(|list| parse_cpu_list(&list));
        siblings.and_then(|siblings| siblings.first().copied()).unwrap_or(cpu)
    };
    let cores: BTreeSet<usize> = parse_cpu_list(list)?.into_iter().map(core_of).collect();
    (!cores.is_empty()).then_some(cores.len())
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
    fn detection_agrees_with_itself() {
        let available = Isa::available();
        assert_eq!(available.first(), Some(&Isa::Portable));
        assert_eq!(available.last(), Some(&Isa::detect()));
        assert!(available.is_sorted());
        assert!(Avx512::new().is_none() || Avx2::new().is_some());
    }

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
    }
}
