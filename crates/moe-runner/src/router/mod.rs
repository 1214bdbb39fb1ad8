//! Routing: from the logits `[T, E_total]` to each token's k experts and their weights.
//!
//! One scalar implementation of every option of [`RouterSpec`]. Arithmetic is in float64 and
//! rounded once: what experts are chosen by ("choice") is f32, and so are the final weights. The
//! order of preference is total: larger choice first, ties to the lowest id, so a token's result
//! does not depend on its neighbours, on threads, or on the machine.
//!
//! Logits that are NaN or +∞ are an error. −∞ masks an expert: neither a bias nor a group's fill
//! can bring it back; it is chosen only where fewer than k others can be, and then weighs 0.

mod compact_ids;
mod ids;
mod replay;
mod routing;
mod score;
mod scratch;
mod select;
mod simulate;
mod trace;
mod weigh;

pub use ids::{LocalId, LogicalId, PhysicalId};
pub use replay::Replay;
pub use routing::Routing;
pub use simulate::{Simulator, Strategy};
pub use trace::{LayerTrace, Trace};

use std::sync::{Mutex, PoisonError};

use moe_kernels::pool::{Inline, ThreadPool};
use moe_kernels::region::{for_each_with, rows_together};

use crate::spec::{Correction, RouterSpec, Selection};
use crate::{Error, Result};
use scratch::Scratch;

/// What a router reads from the checkpoint, beside the gate.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouterTensors {
    /// `[choices]`: added to scores (or logits) when choosing.
    pub correction: Option<Vec<f32>>,
    /// `[E]`: multiplies weights by id.
    pub per_expert_scale: Option<Vec<f32>>,
    /// `[vocabulary · k]`: expert ids by token id.
    pub hash_table: Option<Vec<u32>>,
}

/// One layer's router: [`RouterSpec`] with its tensors and scaling factor, checked.
#[derive(Clone, Debug)]
pub struct Router {
    spec: RouterSpec,
    scale: f32,
    tensors: RouterTensors,
}

impl Router {
    /// `scale` multiplies every weight, those of jointly weighted shared experts included: the
    /// routed scaling factor where the weights carry it, else 1.
    ///
    /// # Errors
    /// If the spec contradicts itself, or if a tensor is missing, not asked for, of the wrong
    /// length, or holds a value that is not finite or no expert's id.
    pub fn new(spec: RouterSpec, scale: f32, tensors: RouterTensors) -> Result<Self> {
        spec.validate().map_err(|reason| Error::input("router", reason))?;
        if !scale.is_finite() {
            return Err(Error::input("router", format!("the scaling factor is {scale}")));
        }
        let correction = spec.correction != Correction::None;
        let rows = match spec.selection {
            Selection::HashTable { vocabulary } => Some(vocabulary),
            _ => None,
        };
        check_floats("correction bias", &tensors.correction, correction.then(|| spec.choices()))?;
        check_floats(
            "per-expert scale",
            &tensors.per_expert_scale,
            spec.per_expert_scale.then_some(spec.experts),
        )?;
        check_length("hash table", &tensors.hash_table, rows.map(|rows| rows * spec.top_k))?;
        for (entry, &id) in tensors.hash_table.iter().flatten().enumerate() {
            if id as usize >= spec.choices() {
                return Err(Error::input(
                    "hash table",
                    format!("token id {}: expert {id} of {}", entry / spec.top_k, spec.choices()),
                ));
            }
        }
        Ok(Self { spec, scale, tensors })
    }

    /// What this router does.
    pub fn spec(&self) -> &RouterSpec {
        &self.spec
    }

    /// Multiplies every weight.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Routes `tokens` rows of `logits`, `[T, E_total]` (see [`RouterSpec::logits`]).
    ///
    /// `input_ids`, `[T]`, are the tokens' ids in the vocabulary; only a hash table reads them.
    ///
    /// # Errors
    /// If a length does not fit, a logit is NaN or +∞ (the message names token and expert), or a
    /// token id is missing or outside the hash table. `out` then holds no tokens.
    pub fn route(
        &self,
        logits: &[f32],
        input_ids: Option<&[u32]>,
        tokens: usize,
        out: &mut Routing,
    ) -> Result<()> {
        self.route_on(&Inline, OnBadLogits::Refuse, logits, input_ids, tokens, out)
    }

    /// The same, the rows spread over the threads of `pool`.
    pub(crate) fn route_on(
        &self,
        pool: &dyn ThreadPool,
        bad: OnBadLogits,
        logits: &[f32],
        input_ids: Option<&[u32]>,
        tokens: usize,
        out: &mut Routing,
    ) -> Result<()> {
        out.clear();
        let source = match self.spec.selection {
            Selection::HashTable { vocabulary } => {
                Source::Table(self.check_input_ids(input_ids, vocabulary, tokens)?)
            }
            _ => Source::Choice,
        };
        self.route_rows(pool, bad, logits, source, tokens, out)
    }

    /// Weighs experts that were chosen elsewhere, `ids` `[T, k]`, by this layer's own rules: what
    /// [`Self::route`] would have yielded, had it chosen them.
    ///
    /// # Errors
    /// As [`Self::route`]; also if an id is not below [`RouterSpec::choices`].
    pub fn route_to(
        &self,
        logits: &[f32],
        ids: &[LogicalId],
        tokens: usize,
        out: &mut Routing,
    ) -> Result<()> {
        self.route_to_on(&Inline, OnBadLogits::Refuse, logits, ids, tokens, out)
    }

    /// The same, the rows spread over the threads of `pool`.
    pub(crate) fn route_to_on(
        &self,
        pool: &dyn ThreadPool,
        bad: OnBadLogits,
        logits: &[f32],
        ids: &[LogicalId],
        tokens: usize,
        out: &mut Routing,
    ) -> Result<()> {
        out.clear();
        self.check_ids(ids, tokens)?;
        self.route_rows(pool, bad, logits, Source::Given(ids), tokens, out)
    }

    /// Checks ids `[T, k]` that were chosen elsewhere.
    pub(crate) fn check_ids(&self, ids: &[LogicalId], tokens: usize) -> Result<()> {
        let (top_k, choices) = (self.spec.top_k, self.spec.choices());
        if Some(ids.len()) != tokens.checked_mul(top_k) {
            return Err(Error::input(
                "expert ids",
                format!("{} ids for {tokens} tokens of top-k {top_k}", ids.len()),
            ));
        }
        if let Some(slot) = ids.iter().position(|id| id.index() >= choices) {
            return Err(Error::input(
                "expert ids",
                format!("token {}: expert {} of {choices}", slot / top_k, ids[slot]),
            ));
        }
        Ok(())
    }

    fn route_rows(
        &self,
        pool: &dyn ThreadPool,
        bad: OnBadLogits,
        logits: &[f32],
        source: Source,
        tokens: usize,
        out: &mut Routing,
    ) -> Result<()> {
        let (width, top_k) = (self.spec.logits(), self.spec.top_k);
        if Some(logits.len()) != tokens.checked_mul(width) {
            return Err(Error::input(
                "router logits",
                format!(
                    "{} values; {tokens} tokens of {width} router outputs were expected",
                    logits.len()
                ),
            ));
        }
        out.resize(tokens, top_k, width - self.spec.choices());
        let threads = pool.threads();
        let mut scratch = out.take_scratch(&self.spec, threads);
        let failed: Mutex<Option<(usize, Error)>> = Mutex::new(None);
        let together = rows_together(tokens, width * size_of::<f64>(), threads);
        for_each_with(pool, scratch.iter_mut(), out.parts(together), |scratch, part| {
            let ids = part.ids.chunks_exact_mut(top_k);
            let mut shared = part.shared_weights;
            for (token, (ids, weights)) in
                (part.first..).zip(ids.zip(part.weights.chunks_exact_mut(top_k)))
            {
                let row = &logits[token * width..][..width];
                match self.route_row(token, row, &source, scratch) {
                    Ok(()) => shared = self.write_row(scratch, ids, weights, shared),
                    Err(_) if bad == OnBadLogits::Nowhere => {
                        ids.fill(LogicalId(u32::MAX));
                        weights.fill(0.0);
                        let of_row = width - self.spec.choices();
                        let (row, rest) = shared.split_at_mut(of_row);
                        row.fill(0.0);
                        shared = rest;
                    }
                    Err(error) => {
                        let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                        // of several the first row's, as if they had come one after another
                        if failed.as_ref().is_none_or(|(first, _)| token < *first) {
                            *failed = Some((token, error));
                        }
                        return;
                    }
                }
            }
        });
        out.scratch = scratch;
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            None => Ok(()),
            Some((_, error)) => {
                out.clear();
                Err(error)
            }
        }
    }

    /// Leaves ids and unscaled weights of one token in `scratch`.
    fn route_row(
        &self,
        token: usize,
        row: &[f32],
        source: &Source,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (choices, top_k) = (self.spec.choices(), self.spec.top_k);
        score::prepare(&self.spec, token, row, &mut scratch.logits)?;
        score::scores(self.spec.score, &scratch.logits[..choices], &mut scratch.scores);
        match source {
            Source::Choice => {
                select::select(&self.spec, self.tensors.correction.as_deref(), scratch);
            }
            Source::Table(input_ids) => {
                let table = self.tensors.hash_table.as_deref().unwrap_or_default();
                let ids = &table[input_ids[token] as usize * top_k..][..top_k];
                scratch.force(ids.iter().copied());
            }
            Source::Given(ids) => {
                scratch.force(ids[token * top_k..][..top_k].iter().map(|id| id.0));
            }
        }
        weigh::weigh(&self.spec, scratch);
        Ok(())
    }

    /// Scales and rounds the weights in the scratch into one token's row. Takes the token's row off
    /// the weights of shared experts, and returns the rest of them.
    fn write_row<'a>(
        &self,
        scratch: &Scratch,
        ids: &mut [LogicalId],
        weights: &mut [f32],
        shared_weights: &'a mut [f32],
    ) -> &'a mut [f32] {
        let scale = f64::from(self.scale);
        let (routed, shared) = scratch.weights.split_at(ids.len());
        for (slot, (candidate, &weight)) in scratch.chosen.iter().zip(routed).enumerate() {
            let by_id = match &self.tensors.per_expert_scale {
                // Identity and skip experts stand after those with a scale.
                Some(scales) => scales.get(candidate.id as usize).map_or(1.0, |&s| f64::from(s)),
                None => 1.0,
            };
            ids[slot] = LogicalId(candidate.id);
            weights[slot] = (weight * scale * by_id) as f32;
        }
        let (row, rest) = shared_weights.split_at_mut(shared.len());
        for (out, &weight) in row.iter_mut().zip(shared) {
            *out = (weight * scale) as f32;
        }
        rest
    }

    fn check_input_ids<'a>(
        &self,
        input_ids: Option<&'a [u32]>,
        vocabulary: usize,
        tokens: usize,
    ) -> Result<&'a [u32]> {
        let Some(input_ids) = input_ids else {
            return Err(Error::input(
                "input ids",
                "this layer routes by token id (hash table); pass the ids of the tokens",
            ));
        };
        if input_ids.len() != tokens {
            return Err(Error::input(
                "input ids",
                format!("{} ids for {tokens} tokens", input_ids.len()),
            ));
        }
        match input_ids.iter().position(|&id| id as usize >= vocabulary) {
            None => Ok(input_ids),
            Some(token) => Err(Error::input(
                "input ids",
                format!(
                    "token {token}: id {} is outside the vocabulary of {vocabulary}",
                    input_ids[token]
                ),
            )),
        }
    }
}

/// What becomes of a token whose logits cannot be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnBadLogits {
    /// An error.
    Refuse,
    /// It goes to no expert: its ids are `u32::MAX`, its weights 0.
    Nowhere,
}

/// Where the ids come from.
enum Source<'a> {
    /// The choice values.
    Choice,
    /// The hash table, at these token ids.
    Table(&'a [u32]),
    /// The caller, `[T, k]`.
    Given(&'a [LogicalId]),
}

fn check_floats(
    what: &'static str,
    values: &Option<Vec<f32>>,
    length: Option<usize>,
) -> Result<()> {
    check_length(what, values, length)?;
    match values.iter().flatten().enumerate().find(|(_, value)| !value.is_finite()) {
        Some((expert, value)) => Err(Error::input(what, format!("expert {expert}: {value}"))),
        None => Ok(()),
    }
}

fn check_length<T>(
    what: &'static str,
    values: &Option<Vec<T>>,
    length: Option<usize>,
) -> Result<()> {
    match (values, length) {
        (Some(values), Some(length)) if values.len() != length => {
            Err(Error::input(what, format!("{} values; {length} were expected", values.len())))
        }
        (None, Some(length)) => {
            Err(Error::input(what, format!("missing; the router needs its {length} values")))
        }
        (Some(_), None) => Err(Error::input(what, "given, but the router's options use none")),
        _ => Ok(()),
    }
}
