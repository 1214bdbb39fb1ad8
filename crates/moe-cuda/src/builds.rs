//! Every way in which the kernels' sources are built.

use crate::few::FewFormat;
use crate::nvrtc::Source;
use crate::router::RawRouter;
use crate::sources::{
    EXCHANGE, FEW, GROUPED, LIMITS, PACK, PLAN, ROUTE, ROWS, SLOTS, SORTED, TENSOR,
};
use crate::weights::{Activation, Element, RawActivation};
use crate::{few, limits, many};

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
