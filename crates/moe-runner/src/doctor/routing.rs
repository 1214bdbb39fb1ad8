//! Whether the router routes: random tokens, and where they go.

use super::Severity;
use super::finding::{About, FindingKind, Findings};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::architecture::LayerEntry;
use crate::random::Random;
use crate::runner::reference;
use crate::spec::Selection;
use crate::weights::LoadedLayer;

/// Random tokens.
const TOKENS: usize = 64;

/// Tokens that are routed at once.
const TOGETHER: usize = 4;

/// What the tokens' numbers are multiplied with the second time: then no bias of the gate counts.
const LOUD: f32 = 1000.0;

/// Whether so few tokens as went to other experts than the busiest `top_k` say that routing has
/// collapsed: of at least 32 tokens none, where there are more experts than that. `load` is the number
/// of slots of each expert.
pub fn is_collapsed(load: &[usize], top_k: usize) -> bool {
    let slots: usize = load.iter().sum();
    let used = load.iter().filter(|slots| **slots > 0).count();
    used <= top_k && top_k < load.len() && slots >= 32 * top_k
}

/// Routes random tokens.
pub(super) fn probe(
    checkpoint: &Checkpoint,
    entry: &LayerEntry,
    layer: &LoadedLayer,
    findings: &mut Findings,
) {
    let router = &layer.spec.router;
    let quiet = collapsed(layer, 1.0);
    let Some(experts) = quiet else { return };
    let severity = match collapsed(layer, LOUD) {
        Some(_) => Severity::Error,
        None => Severity::Warning,
    };
    let tensors = &entry.tensors;
    let (file, name) = match (router.selection, &tensors.hash_table) {
        (Selection::HashTable { .. }, Some(table)) => {
            (super::file_of(checkpoint, table), table.clone())
        }
        _ => super::weights::stored(checkpoint, &tensors.gate),
    };
    for expert in experts {
        let about = About { expert: Some(expert), file, name: &name };
        findings.add_as(FindingKind::CollapsedRouting, severity, about, || {
            format!(
                "sends all of {TOKENS} random tokens to the same {} of {} experts",
                router.top_k,
                router.choices()
            )
        });
    }
}

/// The experts that all tokens go to, if there are no others; `None` too where nothing can be told.
fn collapsed(layer: &LoadedLayer, loudness: f32) -> Option<Vec<usize>> {
    let router = &layer.spec.router;
    let mut random = Random::new(0);
    let ids: Option<Vec<u32>> = match router.selection {
        Selection::HashTable { vocabulary } => {
            let spread = |token| (token * vocabulary / TOKENS) as u32;
            Some((0..TOKENS).map(spread).collect())
        }
        _ => None,
    };
    // few at a time: rows may be long
    let mut logits = Vec::new();
    for _ in 0..TOKENS / TOGETHER {
        let numbers = TOGETHER * layer.spec.dims.hidden;
        let hidden: Vec<f32> = (0..numbers).map(|_| random.normal() as f32 * loudness).collect();
        logits.extend(reference::router_logits(layer, &hidden).ok()?);
    }
    let routing = reference::route(layer, &logits, ids.as_deref(), TOKENS).ok()?;
    let load = routing.load(router.choices());
    let used = || load.iter().enumerate().filter(|(_, slots)| **slots > 0).map(|(id, _)| id);
    is_collapsed(&load, router.top_k).then(|| used().collect())
}
