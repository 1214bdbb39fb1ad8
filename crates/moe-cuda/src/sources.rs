//! The kernels' sources, and every way in which they are built.

use crate::few::FewFormat;
use crate::nvrtc::Source;
use crate::router::RawRouter;
use crate::weights::{Activation, Element, RawActivation};
use crate::{few, limits, many};

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

/// One way to build a source.
#[derive(Clone, Debug)]
pub struct Build {
    /// The source.
    pub source: &'static Source,
    /// The compiler's options.
    pub options: Vec<String>,
    /// Its kernels must not spill registers.
    pub hot: bool,
    /// For which architectures.
    pub archs: &'static [&'static str],
}

/// Everything that this crate compiles at run time. Continuous integration compiles it all for each
/// architecture.
pub fn builds() -> Vec<Build> {
    let silu = Activation::Silu;
    let build = |source, options, archs| Build { source, options, hot: false, archs };
    let all = |source, options| build(source, options, &["sm_80", "sm_90a", "sm_100a"]);
    let from_hopper = |source, options| build(source, options, &["sm_90a", "sm_100a"]);
    let mut builds: Vec<Build> =
        [&ROWS, &SLOTS, &PLAN, &EXCHANGE, &LIMITS].map(|source| all(source, Vec::new())).into();
    builds.push(all(&ROUTE, vec!["--fmad=false".into()]));
    builds.extend(Element::ALL.iter().map(|element| all(&GROUPED, element.options())));
    for format in [FewFormat::Int4, FewFormat::Mxfp4] {
        builds.push(all(&PACK, format.options()));
    }
    for router in [None, Some(&RawRouter::plain())] {
        for options in few::published(router) {
            builds.push(Build { hot: true, ..from_hopper(&FEW, options) });
        }
    }
    for format in [0, 1] {
        builds.push(build(&TENSOR, limits::options(format), &["sm_90a"]));
    }
    for format in [FewFormat::Bf16, FewFormat::Fp8Block, FewFormat::Int4, FewFormat::Mxfp4] {
        let source = many::product(format).0;
        if !format.packed() {
            builds.push(build(&SORTED, format.options(), &["sm_90a"]));
        }
        for second in [0, 1] {
            let options = many::options(
                format,
                second,
                format!("-DACTIVATION={}", RawActivation::new(silu, true).kind),
            );
            builds.push(Build { hot: true, ..build(source, options, &["sm_90a"]) });
        }
    }
    builds
}
