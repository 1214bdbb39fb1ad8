//! Mixture-of-experts models that do not fit the options of a layer, and why.

use crate::checkpoint::Config;
use crate::{Error, Result};

/// `model_type`s, and what does not fit.
const REFUSED: &[(&[&str], &str)] = &[
    (
        &["switch_transformers", "nllb-moe", "nllb_moe"],
        "tokens beyond an expert's capacity are dropped, so a token's output depends on the others",
    ),
    (&["doge"], "experts are chosen by product keys and are pairs of embeddings, not projections"),
    (&["zaya"], "the router is a small network with a state that passes from layer to layer"),
    (
        &["ernie4_5_vl_moe", "ernie4_5_moe_vl"],
        "text and vision tokens have two gates and two sets of experts in one layer",
    ),
    (&["vitpose_backbone", "vitpose"], "experts are chosen by data set, not by token"),
    (&["pi0"], "its 'experts' are two whole models that share attention, not routed by token"),
];

/// Refuses what is known not to fit.
///
/// # Errors
/// [`Error::Config`] with the reason.
pub(super) fn check(config: &Config, model_type: Option<&str>) -> Result<(), Error> {
    let row = REFUSED.iter().find(|(types, _)| model_type.is_some_and(|t| types.contains(&t)));
    match (row, model_type) {
        (Some((_, reason)), Some(model_type)) => {
            Err(config
                .error("model_type", format!("is '{model_type}', which cannot be run: {reason}")))
        }
        _ => Ok(()),
    }
}

/// Every model type here, with the reason.
pub(super) fn all() -> impl Iterator<Item = (&'static str, &'static str)> {
    REFUSED.iter().flat_map(|(types, reason)| types.iter().map(move |name| (*name, *reason)))
}
