//! Plain loops, compiled once for each instruction set.

/// Compiles a function for AVX-512, for AVX2 and for the baseline, and picks at run time. What it
/// calls must be inlined to be compiled so too.
macro_rules! for_each_isa {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $Arg:ty),*) $body:block) => {
        $(#[$doc])*
        $vis fn $name($($arg: $Arg),*) {
            #[inline(always)]
            fn body($($arg: $Arg),*) $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
                fn avx512($($arg: $Arg),*) {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $Arg),*) {
                    body($($arg),*)
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: this CPU has the features that the function is compiled for.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: this CPU has the feature that the function is compiled for.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}

pub(super) use for_each_isa;
