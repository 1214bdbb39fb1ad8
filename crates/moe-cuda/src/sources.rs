//! The kernels' sources.

use crate::nvrtc::Source;

macro_rules! source {
    ($name:literal) => {
        Source {
            name: $name,
            text: include_str!(concat!("kernels/", $name, ".cu")),
            headers: HEADERS,
        }
    };
}

const HEADERS: &[(&str, &str)] = &[
    ("common.cuh", include_str!("kernels/common.cuh")),
    ("rows.cuh", include_str!("kernels/rows.cuh")),
    ("route.cuh", include_str!("kernels/route.cuh")),
    ("stored.cuh", include_str!("kernels/stored.cuh")),
    ("wgmma.cuh", include_str!("kernels/wgmma.cuh")),
    ("ptx.cuh", include_str!("kernels/ptx.cuh")),
    ("many.cuh", include_str!("kernels/many.cuh")),
];

/// Conversion, norms, quantisation, gate product, sums.
pub(crate) static ROWS: Source = source!("rows");
/// Rows of slots, and the end of a pass.
pub(crate) static SLOTS: Source = source!("slots");
/// Rows between ranks.
pub(crate) static EXCHANGE: Source = source!("exchange");
/// Routing.
pub(crate) static ROUTE: Source = source!("route");
/// Slots sorted by expert.
pub(crate) static PLAN: Source = source!("plan");
/// Products of any stored format.
pub(crate) static GROUPED: Source = source!("grouped");
/// Packs 4-bit weights for few tokens.
pub(crate) static PACK: Source = source!("pack");
/// Experts for few tokens.
pub(crate) static FEW: Source = source!("few");
/// Experts for many tokens, bf16.
pub(crate) static MANY: Source = source!("many");
/// Experts for many tokens, FP8.
pub(crate) static MANY8: Source = source!("many8");
/// Before and after those two.
pub(crate) static SORTED: Source = source!("sorted");
/// Experts for many tokens, of 4-bit weights.
pub(crate) static MANY4: Source = source!("many4");

/// Bandwidth and multiply-adds.
pub(crate) static LIMITS: Source = source!("limits");
/// Hopper's tensor cores.
pub(crate) static TENSOR: Source = source!("tensor");
