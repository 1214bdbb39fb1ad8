//! One pass over every weight of a layer: what is no number, what is zero, how large rows are, and a
//! hash of what they hold.

use std::fmt;
use std::path::Path;

use moe_kernels::pool::ThreadPool;
use moe_kernels::region;

use super::finding::{About, FindingKind, Findings};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::architecture::{Experts, LayerEntry, Projection, StepTensors};
use crate::weights::quant::names;
use crate::weights::{Expert, LoadedLayer, Matrix, StepWeights};

/// Which projection of the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    Gate,
    Up,
    Down,
}

/// Where a matrix stands in the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    Routed(usize, Role),
    Shared(usize, Role),
    Router,
    Transform,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gate => "gate projection",
            Self::Up => "up projection",
            Self::Down => "down projection",
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Routed(index, role) => write!(f, "the {role} of expert {index}"),
            Self::Shared(index, role) => write!(f, "the {role} of shared expert {index}"),
            Self::Router => f.write_str("the router's gate"),
            Self::Transform => f.write_str("a projection around the experts"),
        }
    }
}

/// A matrix, and what was seen of it.
pub(super) struct Seen<'a> {
    pub(super) place: Place,
    pub(super) file: &'a Path,
    pub(super) name: String,
    matrix: &'a Matrix,
    /// The largest magnitude of each row.
    pub(super) maxima: Vec<f32>,
    /// Of all values, in their places.
    pub(super) hash: u128,
    finite: bool,
}

impl Seen<'_> {
    /// All values are finite, and not all are zero.
    pub(super) fn is_usable(&self) -> bool {
        self.finite && !self.is_zero()
    }

    pub(super) fn is_zero(&self) -> bool {
        self.maxima.iter().all(|max| *max == 0.0)
    }

    pub(super) fn about(&self) -> About<'_> {
        let expert = match self.place {
            Place::Routed(expert, _) => Some(expert),
            _ => None,
        };
        About { expert, file: self.file, name: &self.name }
    }
}

/// Reads the weights on all threads of `pool`: all but those of routed experts that are not `wanted`.
/// What is wrong with a matrix or vector by itself is added to `findings`.
pub(super) fn read<'a>(
    checkpoint: &'a Checkpoint,
    entry: &LayerEntry,
    layer: &'a LoadedLayer,
    wanted: &dyn Fn(usize) -> bool,
    pool: &dyn ThreadPool,
    findings: &mut Findings,
) -> Vec<Seen<'a>> {
    let mut seen = matrices(checkpoint, entry, layer, wanted);
    let numbered = seen.iter_mut().enumerate();
    let mut parts: Vec<Part> =
        numbered.flat_map(|(index, seen)| Seen::parts(index, seen)).collect();
    region::for_each(pool, parts.iter_mut(), Part::read);
    let found: Vec<(usize, u128, Option<BadValue>)> =
        parts.iter().map(|part| (part.matrix_index, part.hash, part.bad)).collect();
    for (index, hash, bad) in found {
        let seen = &mut seen[index];
        seen.hash = seen.hash.wrapping_add(hash);
        if let Some(BadValue { row, col, value }) = bad
            && std::mem::replace(&mut seen.finite, false)
        {
            findings.add(FindingKind::NonFinite, seen.about(), || {
                format!("has {value} at row {row}, column {col} ({})", seen.place)
            });
        }
    }
    for seen in &seen {
        zeros(seen, findings);
    }
    vectors(checkpoint, entry, layer, wanted, findings);
    seen
}

/// Zeros where weights should be.
fn zeros(seen: &Seen, findings: &mut Findings) {
    /// Fewer rows may well be padding.
    const MANY: usize = 8;
    let place = seen.place;
    let empty: Vec<usize> =
        seen.maxima.iter().enumerate().filter(|(_, m)| **m == 0.0).map(|(row, _)| row).collect();
    let kind =
        if place == Place::Router { FindingKind::ZeroGate } else { FindingKind::ZeroWeights };
    if seen.is_zero() {
        return findings.add(kind, seen.about(), || format!("is all zeros ({place})"));
    }
    let Some(first) = empty.first() else { return };
    let (count, rows) = (empty.len(), seen.maxima.len());
    match place {
        Place::Router => {
            for expert in &empty {
                let about = About { expert: Some(*expert), ..seen.about() };
                findings.add_as(kind, super::Severity::Warning, about, || {
                    format!("has no weight but zeros in row {expert}: no token matters to it")
                });
            }
        }
        _ if count >= rows.div_ceil(MANY) && rows >= MANY => {
            findings.add(FindingKind::ZeroRows, seen.about(), || {
                format!(
                    "has {count} rows of zeros among {rows}, the first is row {first} ({place})"
                )
            });
        }
        _ => {}
    }
}

/// The matrices of a layer, nothing read yet.
fn matrices<'a>(
    checkpoint: &'a Checkpoint,
    entry: &LayerEntry,
    layer: &'a LoadedLayer,
    wanted: &dyn Fn(usize) -> bool,
) -> Vec<Seen<'a>> {
    let mut seen = Vec::new();
    let mut add = |place, projection: &Projection, matrix: &'a Matrix| {
        let (file, name) = stored(checkpoint, projection);
        let maxima = vec![0.0; matrix.rows()];
        seen.push(Seen { place, file, name, matrix, maxima, hash: 0, finite: true });
    };
    let tensors = &entry.tensors;
    if let Some(gate) = &layer.gate {
        add(Place::Router, &tensors.gate, &gate.weight);
    }
    let mut branch = |tensors: &Experts, experts: &'a [Expert], place: fn(usize, Role) -> Place| {
        for (index, expert) in experts.iter().enumerate() {
            if matches!(place(index, Role::Up), Place::Routed(..)) && !wanted(index) {
                continue;
            }
            let tensors = tensors.get(index);
            if let (Some(tensors), Some(gate)) = (&tensors.gate, &expert.gate) {
                add(place(index, Role::Gate), tensors, gate);
            }
            add(place(index, Role::Up), &tensors.up, &expert.up);
            add(place(index, Role::Down), &tensors.down, &expert.down);
        }
    };
    branch(&tensors.experts, &layer.experts, Place::Routed);
    if let (Some(tensors), Some(shared)) = (&tensors.shared, &layer.shared) {
        branch(&tensors.experts, &shared.experts, Place::Shared);
    }
    let steps = tensors.input_transform.iter().zip(&layer.input_transform);
    for step in steps.chain(tensors.output_transform.iter().zip(&layer.output_transform)) {
        if let (StepTensors::Linear(projection), StepWeights::Linear(matrix)) = step {
            add(Place::Transform, projection, matrix);
        }
    }
    seen
}

/// The file and name of the tensor that holds the codes of a projection.
pub(super) fn stored<'a>(
    checkpoint: &'a Checkpoint,
    projection: &Projection,
) -> (&'a Path, String) {
    let endings = [names::CODES, names::PACKED, names::PACKED_FLOATS, names::QWEIGHT].concat();
    let module = &projection.module;
    let named = endings.iter().map(|ending| format!("{module}{ending}"));
    let info = named.filter_map(|name| checkpoint.info(&name)).next();
    info.map_or((checkpoint.path(), module.clone()), |info| (info.file, info.name.to_owned()))
}

/// Some rows of a matrix.
struct Part<'a> {
    matrix_index: usize,
    matrix: &'a Matrix,
    first: usize,
    maxima: &'a mut [f32],
    hash: u128,
    bad: Option<BadValue>,
}

/// The first value of a matrix's part that is no number.
#[derive(Clone, Copy)]
struct BadValue {
    row: usize,
    col: usize,
    value: f32,
}

/// Rows that a thread reads at once.
const ROWS: usize = 128;

/// Columns that are decoded at once. Of a matrix that is stored by columns, the cache lines of so many
/// columns hold all the rows that are read at once.
const COLUMNS: usize = 1024;

impl<'a> Seen<'a> {
    fn parts(matrix_index: usize, seen: &'a mut Seen<'_>) -> impl Iterator<Item = Part<'a>> {
        let matrix = seen.matrix;
        let firsts = (0..).step_by(ROWS);
        firsts.zip(seen.maxima.chunks_mut(ROWS)).map(move |(first, maxima)| Part {
            matrix_index,
            matrix,
            first,
            maxima,
            hash: 0,
            bad: None,
        })
    }
}

impl Part<'_> {
    /// Reads the rows.
    fn read(&mut self) {
        let mut values = [0.0; COLUMNS];
        let all = self.matrix.cols();
        for first in (0..all).step_by(COLUMNS) {
            let cols = first..all.min(first + COLUMNS);
            let values = &mut values[..cols.len()];
            let Some(window) = self.matrix.cols_of(cols) else { return };
            for (row, max) in (self.first..).zip(self.maxima.iter_mut()) {
                window.decode_row(row, values);
                let (largest, hash) = look_at(values);
                self.hash = self.hash.wrapping_add(mixed(hash, row, first));
                if !largest.is_finite() && self.bad.is_none() {
                    let col = values.iter().position(|value| !value.is_finite()).unwrap_or(0);
                    self.bad = Some(BadValue { row, col: first + col, value: values[col] });
                }
                // NaN stays
                *max = if largest > *max || largest.is_nan() { largest } else { *max };
            }
        }
    }
}

/// The largest magnitude of some values (NaN where one is NaN), and a hash of them in their places.
fn look_at(row: &[f32]) -> (f32, [u64; 2]) {
    const LANES: usize = 8;
    let mut lanes = [0x9e37_79b9_7f4a_7c15_u64; LANES];
    let mut largest = 0;
    let mut take = |lane: &mut u64, low: f32, high: f32| {
        let (low, high) = (low.to_bits(), high.to_bits());
        // magnitudes are in the order of their bits; infinity and NaN come last
        largest = largest.max(low & 0x7fff_ffff).max(high & 0x7fff_ffff);
        *lane = (*lane ^ (u64::from(low) | u64::from(high) << 32)).wrapping_mul(PRIME);
    };
    let (chunks, rest) = row.as_chunks::<{ 2 * LANES }>();
    for chunk in chunks {
        for (lane, pair) in lanes.iter_mut().zip(chunk.as_chunks::<2>().0) {
            take(lane, pair[0], pair[1]);
        }
    }
    for (lane, pair) in lanes.iter_mut().zip(rest.chunks(2)) {
        take(lane, pair[0], pair.get(1).copied().unwrap_or(0.0));
    }
    let fold = |start: u64, by: u32| {
        lanes
            .iter()
            .fold(start, |all, lane| (all.rotate_left(by) ^ lane ^ lane >> 29).wrapping_mul(PRIME))
    };
    (f32::from_bits(largest), [fold(1, 23), fold(2, 41)])
}

const PRIME: u64 = 0xff51_afd7_ed55_8ccd;

/// A hash with its place, so that the sum over all is one of the matrix.
fn mixed([a, b]: [u64; 2], row: usize, col: usize) -> u128 {
    let place = ((row as u64) << 32 ^ col as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mix = |half: u64| {
        let half = (half ^ place).wrapping_mul(PRIME);
        (half ^ half >> 32).wrapping_mul(PRIME)
    };
    u128::from(mix(a)) << 64 | u128::from(mix(b).rotate_left(17))
}

/// Biases, norms and scales: those that are no numbers, and gates of zeros.
fn vectors(
    checkpoint: &Checkpoint,
    entry: &LayerEntry,
    layer: &LoadedLayer,
    wanted: &dyn Fn(usize) -> bool,
    findings: &mut Findings,
) {
    let tensors = &entry.tensors;
    let mut look = |expert, name: Option<&String>, values: Option<&Vec<f32>>| {
        let (Some(name), Some(values)) = (name, values) else { return false };
        let about = || About { expert, file: super::file_of(checkpoint, name), name };
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            findings.add(FindingKind::NonFinite, about(), || {
                format!("has {} at {index}", values[index])
            });
        }
        values.iter().all(|value| *value == 0.0)
    };
    if let Some(gate) = &layer.gate {
        look(None, tensors.gate_bias.as_ref(), gate.bias.as_ref());
        look(None, tensors.correction.as_ref(), gate.correction.as_ref());
        look(None, tensors.per_expert_scale.as_ref(), gate.per_expert_scale.as_ref());
        look(None, tensors.gate_input_scale.as_ref(), gate.input_scale.as_ref());
    }
    let mut branch = |tensors: &Experts, experts: &[Expert], routed: bool| {
        for (index, expert) in experts.iter().enumerate() {
            if routed && !wanted(index) {
                continue;
            }
            let (id, tensors) = (routed.then_some(index), tensors.get(index));
            for (part, values) in [
                (&tensors.gate_bias, &expert.gate_bias),
                (&tensors.up_bias, &expert.up_bias),
                (&tensors.down_bias, &expert.down_bias),
            ] {
                look(id, part.as_ref().map(|part| &part.tensor), values.as_ref());
            }
            look(id, tensors.norm.as_ref(), expert.norm.as_ref());
        }
    };
    branch(&tensors.experts, &layer.experts, true);
    let mut gate_of_shared = false;
    if let (Some(tensors), Some(shared)) = (&tensors.shared, &layer.shared) {
        branch(&tensors.experts, &shared.experts, false);
        gate_of_shared = look(None, tensors.gate.as_ref(), shared.gate.as_ref());
        look(None, tensors.input_norm.as_ref(), shared.input_norm.as_ref());
        look(None, tensors.output_norm.as_ref(), shared.output_norm.as_ref());
    }
    let steps = tensors.input_transform.iter().zip(&layer.input_transform);
    for step in steps.chain(tensors.output_transform.iter().zip(&layer.output_transform)) {
        if let (StepTensors::RmsNorm(name), StepWeights::RmsNorm(values)) = step {
            look(None, Some(name), Some(values));
        }
    }
    look(None, tensors.output_bias.as_ref(), layer.output.bias.as_ref());
    look(None, tensors.output_norm.as_ref(), layer.output.norm.as_ref());
    if gate_of_shared && let Some(name) = tensors.shared.as_ref().and_then(|s| s.gate.as_ref()) {
        let about = About { expert: None, file: super::file_of(checkpoint, name), name };
        findings.add(FindingKind::ZeroGate, about, || {
            "is all zeros (the gate of the shared experts)".into()
        });
    }
}
