//! The kernels' sources, and every way in which they are built.

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
    ("stored.cuh", include_str!("kernels/stored.cuh")),
];

/// Conversion, norms, quantisation, gate product, sums.
pub(crate) static ROWS: Source = source!("rows");
/// Routing.
pub(crate) static ROUTE: Source = source!("route");
/// Slots sorted by expert.
pub(crate) static PLAN: Source = source!("plan");
/// Products of any stored format.
pub(crate) static GROUPED: Source = source!("grouped");

/// One way to build a source.
#[derive(Clone, Debug)]
pub struct Build {
    /// The source.
    pub source: &'static Source,
    /// The compiler's options.
    pub options: Vec<String>,
    /// Its kernels must not spill registers.
    pub hot: bool,
    /// It uses instructions of one chip only, `sm_90a`; else it is for every chip from `sm_80` on.
    pub hopper: bool,
}

/// Everything that this crate compiles at run time. Continuous integration compiles it all for each
/// architecture.
pub fn builds() -> Vec<Build> {
    let plain = |source| Build { source, options: Vec::new(), hot: false, hopper: false };
    let mut all = vec![plain(&ROWS), plain(&ROUTE), plain(&PLAN)];
    all.extend(
        crate::experts::Element::ALL
            .iter()
            .map(|element| Build { options: element.options(), ..plain(&GROUPED) }),
    );
    all
}
