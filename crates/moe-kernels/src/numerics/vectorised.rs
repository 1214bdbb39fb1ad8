//! Plain loops, compiled once for each instruction set.

/// Compiles a function for AVX-512, for AVX2 and for the baseline; its first argument, a
/// [`Cpu`](crate::isa::Cpu), says which of them runs. What it calls must be inlined to be compiled
/// so too.
macro_rules! for_each_isa {
    (
        $(#[$doc:meta])*
        $vis:vis fn $name:ident($cpu:ident: Cpu $(, $arg:ident: $Arg:ty)* $(,)?) $body:block
    ) => {
        $(#[$doc])*
        $vis fn $name($cpu: $crate::isa::Cpu $(, $arg: $Arg)*) {
            #[inline(always)]
            fn body($($arg: $Arg),*) $body

            #[cfg(target_arch = "x86_64")]
            {
                use $crate::isa::Features;
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                fn avx512($($arg: $Arg),*) {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $Arg),*) {
                    body($($arg),*)
                }
                if $cpu.has(Features::V4) {
                    // SAFETY: this CPU has the features that the function is compiled for.
                    return unsafe { avx512($($arg),*) };
                }
                if $cpu.has(Features::V3) {
                    // SAFETY: as above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            let _ = $cpu;
            body($($arg),*)
        }
    };
}

pub(crate) use for_each_isa;
