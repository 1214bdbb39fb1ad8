//! AVX-512 with dot products of pairs of bf16: `vdpbf16ps`.

use super::avx512::Avx512;
use super::panel::Panel;
use super::tile::{Args, Chain, Shape, shapes};

pub(super) const fn of<P: Panel<Avx512>>() -> &'static [Shape] {
    const { &shapes!(tile::<P>: (8, 2 of 4), (4, 4 of 4), (2, 4 of 4), (1, 4 of 4), (1, 1 of 1)) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx2,fma,f16c")]
unsafe fn tile<P: Panel<Avx512>, const M: usize, const N: usize, const W: usize>(args: &Args<'_>) {
    // SAFETY: the caller's, and the features are enabled here.
    unsafe { super::tile::tile::<Avx512, P, Chain, M, N, W>(args) }
}
