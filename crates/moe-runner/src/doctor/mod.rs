//! The doctor: what is hardly meant in a checkpoint that can be loaded, or not meant at all.
//!
//! [`formats`] looks at number formats and scales, [`examine`] at every weight and at what the router
//! does with tokens, [`files`] at the ends of files. Each [`Finding`] names file, tensor and experts;
//! what to do about it stands in the book's page on the doctor.
//!
//! Weights are read once, experts spread over all threads; what is kept of them is a number for each
//! row.

mod copies;
mod files;
mod finding;
mod quantisation;
mod routing;
mod scales;
mod weights;

use std::path::Path;

use moe_kernels::pool::ThreadPool;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::architecture::LayerEntry;
use crate::weights::LoadedLayer;

pub use files::files;
use finding::Findings;
pub use finding::{Finding, FindingKind, Severity};
pub use routing::is_collapsed;

/// What formats and scales of a layer tell, without reading a weight; of an
/// [`outline`](Checkpoint::outline) not even a scale is read. What keeps the layer from loading at all,
/// [`account`](crate::weights::account) tells.
pub fn formats(checkpoint: &Checkpoint, entry: &LayerEntry) -> Vec<Finding> {
    let mut findings = Findings::new(entry.spec.index);
    quantisation::look_at(checkpoint, entry, &mut findings);
    findings.finish()
}

/// All that can be told of a layer, the worst first: [`formats`], every weight, and the routing of
/// random tokens. Where weights are not finite, nothing is routed.
pub fn examine(
    checkpoint: &Checkpoint,
    entry: &LayerEntry,
    layer: &LoadedLayer,
    pool: &dyn ThreadPool,
) -> Vec<Finding> {
    let mut findings = Findings::new(entry.spec.index);
    quantisation::look_at(checkpoint, entry, &mut findings);
    let seen = weights::read(checkpoint, entry, layer, &|_| true, pool, &mut findings);
    scales::compare(&seen, &mut findings);
    copies::find(&seen, &mut findings);
    if seen.iter().all(weights::Seen::is_usable) {
        routing::probe(checkpoint, entry, layer, &mut findings);
    }
    findings.finish()
}

/// What is NaN or infinite among the weights that a token meets which goes to `experts`: theirs, and
/// those of the router, the shared experts and the steps around them.
pub fn non_finite(
    checkpoint: &Checkpoint,
    entry: &LayerEntry,
    layer: &LoadedLayer,
    experts: &[u32],
    pool: &dyn ThreadPool,
) -> Option<Finding> {
    let wanted = |expert: usize| experts.iter().any(|id| *id as usize == expert);
    let mut findings = Findings::new(entry.spec.index);
    weights::read(checkpoint, entry, layer, &wanted, pool, &mut findings);
    findings.finish().into_iter().find(|finding| finding.kind == FindingKind::NonFinite)
}

/// The file that holds a tensor, or those of a module.
fn file_of<'a>(checkpoint: &'a Checkpoint, name: &'a str) -> &'a Path {
    let below = || checkpoint.info(checkpoint.names_below(name).next()?);
    checkpoint.info(name).or_else(below).map_or(checkpoint.path(), |info| info.file)
}
