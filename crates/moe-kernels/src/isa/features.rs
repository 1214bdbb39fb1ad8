//! Features of CPUs as sets, and the proof that this CPU has some.

use std::fmt;
use std::sync::OnceLock;

/// A set of CPU features: what a kernel needs, or what a machine has.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Features(u32);

macro_rules! features {
    ($($(#[$doc:meta])* $name:ident = $bit:literal, $text:literal;)*) => {
        impl Features {
            $($(#[$doc])* pub const $name: Features = Features(1 << $bit);)*

            /// Every feature, with its name in reports.
            pub const ALL: &[(Features, &str)] = &[$((Features::$name, $text)),*];
        }
    };
}

features! {
    /// 256-bit vectors of integers and floats.
    AVX2 = 0, "avx2";
    /// Fused multiply-add of 256-bit vectors.
    FMA = 1, "fma";
    /// Conversions between f16 and f32.
    F16C = 2, "f16c";
    /// AVX-512 F, BW, DQ and VL: the 512-bit vectors of all server CPUs that have any.
    AVX512 = 3, "avx512";
    /// Byte permutations of 512-bit vectors.
    AVX512_VBMI = 4, "avx512_vbmi";
    /// Dot products of pairs of bf16.
    AVX512_BF16 = 5, "avx512_bf16";
    /// Dot products of four 8-bit integers, in 512-bit vectors.
    AVX512_VNNI = 6, "avx512_vnni";
    /// f16 arithmetic.
    AVX512_FP16 = 7, "avx512_fp16";
    /// Dot products of four 8-bit integers, in 256-bit vectors, without AVX-512.
    AVX_VNNI = 8, "avx_vnni";
    /// Tile registers.
    AMX_TILE = 9, "amx_tile";
    /// Tile products of 8-bit integers.
    AMX_INT8 = 10, "amx_int8";
    /// Tile products of bf16.
    AMX_BF16 = 11, "amx_bf16";
    /// 128-bit vectors of 64-bit Arm.
    NEON = 16, "neon";
    /// Arm's dot products of four 8-bit integers.
    DOTPROD = 17, "dotprod";
    /// Arm's products of small matrices of 8-bit integers.
    I8MM = 18, "i8mm";
    /// Arm's bf16 dot products and products of small matrices.
    BF16 = 19, "bf16";
}

impl Features {
    /// No feature: any CPU.
    pub const NONE: Features = Features(0);

    /// AVX2, FMA and F16C: the vectors of x86-64-v3.
    pub const V3: Features = Features::AVX2.with(Features::FMA).with(Features::F16C);

    /// AVX-512 on top of [`V3`](Self::V3): the vectors of x86-64-v4.
    pub const V4: Features = Features::V3.with(Features::AVX512);

    /// Dot products of 8-bit integers on top of [`V4`](Self::V4): Cascade Lake, Zen 4 and what came
    /// after them.
    pub const V4_VNNI: Features = Features::V4.with(Features::AVX512_VNNI);

    /// Dot products of bf16 and byte permutations on top of [`V4_VNNI`](Self::V4_VNNI): Zen 4, Sapphire
    /// Rapids and what came after them.
    pub const V4_BF16: Features =
        Features::V4_VNNI.with(Features::AVX512_BF16).with(Features::AVX512_VBMI);

    /// Tile products of bf16 on top of [`V4_BF16`](Self::V4_BF16): Sapphire Rapids and what came after it.
    pub const V4_AMX: Features =
        Features::V4_BF16.with(Features::AMX_TILE).with(Features::AMX_BF16);

    /// The features of either set.
    pub const fn with(self, other: Features) -> Features {
        Features(self.0 | other.0)
    }

    /// The features of this set that `other` lacks.
    pub const fn without(self, other: Features) -> Features {
        Features(self.0 & !other.0)
    }

    /// Whether all features of `other` are in this set.
    pub const fn contains(self, other: Features) -> bool {
        self.0 & other.0 == other.0
    }

    /// The names of the features, in the order of [`ALL`](Self::ALL).
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Features::ALL.iter().filter(move |(one, _)| self.contains(*one)).map(|(_, name)| *name)
    }
}

/// The names with `+` between them; `portable` for none.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Features::NONE {
            return f.write_str("portable");
        }
        self.names().enumerate().try_for_each(|(i, name)| {
            f.write_str(if i > 0 { "+" } else { "" })?;
            f.write_str(name)
        })
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Proof that this CPU has a set of features, which the holder may use.
///
/// ```
/// use moe_kernels::isa::{Cpu, Features};
/// let all = Cpu::detect();
/// let none = all.only(Features::NONE);
/// assert_eq!(none.features(), Features::NONE);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu(Features);

impl Cpu {
    /// The proof that needs none: any CPU runs portable code.
    pub const PORTABLE: Cpu = Cpu(Features::NONE);

    /// All that this CPU, and the operating system on it, has. Asked once in a process.
    pub fn detect() -> Cpu {
        static FOUND: OnceLock<Features> = OnceLock::new();
        Cpu(*FOUND.get_or_init(found))
    }

    /// This CPU with `features`, if it has them all.
    pub fn having(features: Features) -> Option<Cpu> {
        Cpu::detect().features().contains(features).then_some(Cpu(features))
    }

    /// This CPU with each of the sets that plain loops are compiled for: none, [`Features::V3`] and
    /// [`Features::V4`], as far as it has them.
    pub fn levels() -> impl Iterator<Item = Cpu> {
        [Features::NONE, Features::V3, Features::V4].into_iter().filter_map(Cpu::having)
    }

    /// The same CPU without all features that are not in `allowed`.
    pub fn only(self, allowed: Features) -> Cpu {
        Cpu(Features(self.0.0 & allowed.0))
    }

    /// The features that may be used.
    pub fn features(self) -> Features {
        self.0
    }

    /// Whether all of `features` may be used.
    pub fn has(self, features: Features) -> bool {
        self.0.contains(features)
    }
}

#[cfg(target_arch = "x86_64")]
fn found() -> Features {
    let mut found = Features::NONE;
    let mut add = |has: bool, features| {
        if has {
            found = found.with(features);
        }
    };
    add(is_x86_feature_detected!("avx2"), Features::AVX2);
    add(is_x86_feature_detected!("fma"), Features::FMA);
    add(is_x86_feature_detected!("f16c"), Features::F16C);
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    add(avx512, Features::AVX512);
    add(avx512 && is_x86_feature_detected!("avx512vbmi"), Features::AVX512_VBMI);
    add(avx512 && is_x86_feature_detected!("avx512bf16"), Features::AVX512_BF16);
    add(avx512 && is_x86_feature_detected!("avx512vnni"), Features::AVX512_VNNI);
    add(avx512 && is_x86_feature_detected!("avx512fp16"), Features::AVX512_FP16);
    add(is_x86_feature_detected!("avxvnni"), Features::AVX_VNNI);
    // Registers that this process may not use say what the processor is; their products are missing.
    if tiles_are_saved() && leaf_7_edx() >> 24 & 1 == 1 {
        add(true, Features::AMX_TILE);
        let allowed = tiles_are_allowed();
        add(allowed && leaf_7_edx() >> 25 & 1 == 1, Features::AMX_INT8);
        add(allowed && leaf_7_edx() >> 22 & 1 == 1, Features::AMX_BF16);
    }
    found
}

/// Register EDX of the CPU's leaf 7.
#[cfg(target_arch = "x86_64")]
fn leaf_7_edx() -> u32 {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    if __cpuid(0).eax < 7 { 0 } else { __cpuid_count(7, 0).edx }
}

/// Asks the operating system for tile registers, for all threads of this process. A seccomp filter or a
/// small signal stack may make it refuse: the features are missing then.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn tiles_are_allowed() -> bool {
    const ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XTILEDATA: usize = 18;
    let result: isize;
    // SAFETY: the call reads no memory and writes none; it clobbers rcx and r11.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// Only Linux has a way to ask.
#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn tiles_are_allowed() -> bool {
    false
}

/// Whether the operating system saves tile registers. (A process must still ask it for them.)
#[cfg(target_arch = "x86_64")]
fn tiles_are_saved() -> bool {
    #[target_feature(enable = "xsave")]
    fn saved() -> u64 {
        // SAFETY: the operating system has enabled the instruction: the caller asked.
        unsafe { std::arch::x86_64::_xgetbv(0) }
    }
    const TILES: u64 = 0b11 << 17;
    const OSXSAVE: u32 = 1 << 27;
    let enabled = std::arch::x86_64::__cpuid(1).ecx & OSXSAVE != 0;
    // SAFETY: the CPU has the instruction, as just asked.
    enabled && unsafe { saved() } & TILES == TILES
}

#[cfg(target_arch = "aarch64")]
fn found() -> Features {
    use std::arch::is_aarch64_feature_detected;
    let mut found = Features::NONE;
    let mut add = |has: bool, features| {
        if has {
            found = found.with(features);
        }
    };
    add(is_aarch64_feature_detected!("neon"), Features::NEON);
    add(is_aarch64_feature_detected!("dotprod"), Features::DOTPROD);
    add(is_aarch64_feature_detected!("i8mm"), Features::I8MM);
    add(is_aarch64_feature_detected!("bf16"), Features::BF16);
    found
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn found() -> Features {
    Features::NONE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets() {
        let two = Features::AVX2.with(Features::FMA);
        assert!(two.contains(Features::FMA) && !two.contains(Features::V3));
        assert!(Features::V4.contains(Features::V3));
        assert_eq!(Features::V3.without(two), Features::F16C);
        assert_eq!(two.to_string(), "avx2+fma");
        assert_eq!(Features::NONE.to_string(), "portable");
    }

    #[test]
    fn a_proof_never_grows() {
        let cpu = Cpu::detect();
        for (feature, name) in Features::ALL {
            assert_eq!(Cpu::having(*feature).is_some(), cpu.has(*feature), "{name}");
            let without = cpu.only(cpu.features().without(*feature));
            assert!(!without.has(*feature), "{name}");
            assert!(!without.only(*feature).has(*feature), "{name}");
        }
        assert!(Cpu::PORTABLE.has(Features::NONE));
    }

    /// What the operating system lists of this CPU is what was found.
    #[test]
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    fn agrees_with_the_operating_system() {
        let Ok(text) = std::fs::read_to_string("/proc/cpuinfo") else { return };
        let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or("");
        let has = |name: &str| flags.split_whitespace().any(|flag| flag == name);
        for (feature, name) in [
            (Features::AVX2, "avx2"),
            (Features::FMA, "fma"),
            (Features::F16C, "f16c"),
            (Features::AVX512_VBMI, "avx512vbmi"),
            (Features::AVX512_BF16, "avx512_bf16"),
            (Features::AVX512_VNNI, "avx512_vnni"),
            (Features::AMX_TILE, "amx_tile"),
            (Features::AMX_BF16, "amx_bf16"),
        ] {
            assert_eq!(Cpu::detect().has(feature), has(name), "{name}");
        }
    }
}
