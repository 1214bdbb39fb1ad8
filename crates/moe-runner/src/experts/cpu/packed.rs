//! Experts as the products read them: every projection packed, on all threads.

use std::ops::Range;
use std::sync::Mutex;

use moe_kernels::arena::{bytes, bytes_mut};
use moe_kernels::gemm::gemm;
use moe_kernels::isa::Features;
use moe_kernels::operand::OperandKind;
use moe_kernels::pack::{Packed, UNIT, pack, quantised_rows};
use moe_kernels::region::for_each;
use moe_kernels::rows::{Rows, RowsMut};

use crate::experts::reference::stored_bytes;
use crate::experts::{Arithmetic, BuildCall, KernelDesc, Progress};
use crate::hidden::ActivationDtype;
use crate::weights::{ActivationQuant, Expert, Matrix};
use crate::{Error, Result};

/// A packed projection, with its bias.
pub(super) struct Projection {
    packed: Packed,
    bias: Option<Vec<f32>>,
}

impl Projection {
    /// Packs `matrix` for the best product that `features` allow of `rows`, or of f32 where its zero
    /// points do not go with them.
    pub(super) fn new(
        matrix: &Matrix,
        bias: Option<Vec<f32>>,
        features: Features,
        rows: OperandKind,
    ) -> Result<Self, String> {
        let entry = gemm(matrix.view(), rows, features);
        let entry = entry.or_else(|| gemm(matrix.view(), OperandKind::F32, features));
        let entry = entry.ok_or_else(|| format!("no product reads {}", matrix.describe()))?;
        let packed = pack(matrix.view(), entry).map_err(|refusal| refusal.to_string())?;
        Ok(Self::of(packed, matrix.input, bias))
    }

    /// Of packed weights, for rows that `input` quantises.
    fn of(packed: Packed, input: ActivationQuant, bias: Option<Vec<f32>>) -> Self {
        let packed = match input {
            ActivationQuant::None => packed,
            ActivationQuant::Quantised(qdq) => packed.coded(qdq),
        };
        Self { packed, bias }
    }

    /// Output features.
    pub(super) fn rows(&self) -> usize {
        self.packed.rows()
    }

    /// Input features.
    pub(super) fn cols(&self) -> usize {
        self.packed.cols()
    }

    /// Floats of memory that a row takes as the product reads it.
    pub(super) fn row_len(&self) -> usize {
        self.packed.gemm().operand_bytes(&self.packed, 1) / size_of::<f32>()
    }

    /// Writes a row as the product reads it. `whole` is the largest magnitude of the row that this one is
    /// a slice of, before it was quantised.
    pub(super) fn write(&self, row: &[f32], whole: Option<f32>, into: &mut [f32]) {
        let row = Rows::new(row, 1, row.len(), row.len());
        self.packed.gemm().operand_of(&self.packed, row, whole, bytes_mut(into));
    }

    /// The features `cols`, from a multiple of [`UNIT`] on, of the rows in `memory`, `stride` floats
    /// apart, each row times its slot's weight where slots and weights are given; with the bias.
    pub(super) fn run(
        &self,
        (memory, stride): (&[f32], usize),
        weights: Option<(&[u32], &[f32])>,
        cols: &Range<usize>,
        out: &mut RowsMut<'_>,
    ) {
        let (gemm, rows) = (self.packed.gemm(), out.rows());
        let x = gemm.written(&self.packed, bytes(memory), rows, stride * size_of::<f32>());
        let units = cols.start / UNIT..cols.end.div_ceil(UNIT);
        gemm.run(&self.packed, x, 0..rows, units, out);
        if let Some((slots, weights)) = weights {
            for (i, slot) in slots.iter().enumerate() {
                out.row_mut(i).iter_mut().for_each(|v| *v *= weights[*slot as usize]);
            }
        }
        if let Some(bias) = &self.bias {
            for i in 0..rows {
                out.row_mut(i).iter_mut().zip(&bias[cols.clone()]).for_each(|(v, b)| *v += b);
            }
        }
    }
}

impl std::fmt::Debug for Projection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Packed { .. } = self.packed;
        write!(f, "[{}, {}] for {}", self.rows(), self.cols(), self.packed.gemm().name())
    }
}

/// What rows a kernel multiplies.
#[derive(Clone, Copy)]
struct Kinds {
    /// Those that are not quantised.
    plain: OperandKind,
    /// Those that are, if they lose nothing so; else they are f32.
    quantised: OperandKind,
}

impl Kinds {
    /// For the rows of `matrix`.
    fn of(self, matrix: &Matrix) -> OperandKind {
        match matrix.input {
            ActivationQuant::None => self.plain,
            ActivationQuant::Quantised(qdq) => {
                match quantised_rows(self.quantised, matrix.view(), &qdq) {
                    true => self.quantised,
                    false => OperandKind::F32,
                }
            }
        }
    }
}

/// An expert, packed.
pub(super) struct PackedExpert {
    pub(super) gate: Option<Projection>,
    pub(super) up: Projection,
    pub(super) down: Projection,
    pub(super) up_input: ActivationQuant,
    pub(super) down_input: ActivationQuant,
    pub(super) norm: Option<Vec<f32>>,
    /// Bytes behind it in the checkpoint.
    pub(super) stored_bytes: usize,
}

impl PackedExpert {
    /// The gate projection, where it reads rows in another way than the up projection: with columns
    /// in another order.
    pub(super) fn gate_rows(&self) -> Option<&Projection> {
        self.gate.as_ref().filter(|gate| !gate.packed.takes(&self.up.packed))
    }

    /// Floats of a row as the first product reads it: for the up projection, then for the gate where
    /// that reads it differently.
    pub(super) fn first_len(&self) -> usize {
        self.up.row_len() + self.gate_rows().map_or(0, Projection::row_len)
    }
}

/// What an expert has beside its projections: whether it is gated, the quantisation of both products'
/// rows, its norm, its stored bytes.
type Rest = (bool, ActivationQuant, ActivationQuant, Option<Vec<f32>>, usize);

/// Packs all experts of `call`, or maps what was packed before, projection by projection on all threads; a projection's stored
/// numbers are let go of as soon as it is packed.
pub(super) fn pack_all(desc: &KernelDesc, call: BuildCall<'_>) -> Result<Vec<PackedExpert>> {
    let BuildCall { experts, rows, pack_cache, pool, progress, .. } = call;
    let features = desc.target.features();
    let tiles = features.contains(Features::AMX_BF16);
    let bf16 = if tiles { OperandKind::TileBf16 } else { OperandKind::Bf16 };
    let (plain, quantised) = match desc.arithmetic {
        Arithmetic::Bf16 => (bf16, bf16),
        Arithmetic::Int8 => (OperandKind::F32, OperandKind::Int8),
        _ => (OperandKind::F32, OperandKind::F32),
    };
    let second = Kinds { plain, quantised };
    // rows that a transform has made are not bf16, and the bound has no room for two roundings
    let first = match rows {
        ActivationDtype::Bf16 => second,
        _ => Kinds { plain: OperandKind::F32, quantised },
    };
    let (mut rest, mut jobs) = (Vec::new(), Vec::new());
    for expert in experts {
        let bytes = stored_bytes(&expert);
        let Expert { gate, up, down, gate_bias, up_bias, down_bias, norm } = expert;
        rest.push((gate.is_some(), up.input, down.input, norm, bytes));
        // gate and up share their rows, which are quantised for up
        let mut job = |matrix: Matrix, bias, kinds: Kinds| {
            let rows = kinds.of(&matrix);
            jobs.push((matrix, bias, rows));
        };
        if let Some(mut gate) = gate {
            gate.input = up.input;
            job(gate, gate_bias, first);
        }
        job(up, up_bias, first);
        job(down, down_bias, second);
    }
    let total = jobs.len();
    let wanted: Vec<_> = jobs.iter().map(|(matrix, _, rows)| (matrix.view(), *rows)).collect();
    let place = pack_cache.map(|cache| cache.place(desc, &wanted, pool));
    let kept = place.as_ref().and_then(|place| place.map(&wanted));
    drop(wanted);
    let mut packed: Vec<Option<Result<Projection, String>>> = Vec::new();
    if let Some(kept) = kept {
        let kept = kept.into_iter().zip(jobs);
        packed.extend(kept.map(|(packed, (matrix, bias, _))| {
            Some(Ok(Projection::of(packed, matrix.input, bias)))
        }));
        progress(Progress { done: total, total });
        return whole(desc, packed, rest);
    }
    packed.resize_with(total, || None);
    let progress = Mutex::new((0, progress));
    for_each(pool, jobs.into_iter().zip(&mut packed), |((matrix, bias, rows), to)| {
        *to = Some(Projection::new(&matrix, bias, features, rows));
        drop(matrix);
        // a panic of the callback ends the region, and nobody looks at the count then
        if let Ok(mut progress) = progress.lock() {
            progress.0 += 1;
            let (done, report) = &mut *progress;
            report(Progress { done: *done, total });
        }
    });
    if let Some(place) = place {
        let all: Option<Vec<&Packed>> =
            packed.iter().map(|one| Some(&one.as_ref()?.as_ref().ok()?.packed)).collect();
        // what cannot be packed is an error below
        all.into_iter().for_each(|all| place.keep(&all));
    }
    whole(desc, packed, rest)
}

/// Experts of their projections and the rest.
fn whole(
    desc: &KernelDesc,
    packed: Vec<Option<Result<Projection, String>>>,
    rest: Vec<Rest>,
) -> Result<Vec<PackedExpert>> {
    let mut packed = packed.into_iter().flatten();
    let mut next = |expert: usize, what: &str| {
        let refused =
            |reason| Error::NoKernel(format!("{}: expert {expert}, {what}: {reason}", desc.name));
        packed.next().unwrap_or_else(|| Err("was not packed".into())).map_err(refused)
    };
    let experts = rest.into_iter().enumerate();
    let whole = experts.map(|(e, (gated, up_input, down_input, norm, stored_bytes))| {
        let gate = gated.then(|| next(e, "gate projection")).transpose()?;
        let (up, down) = (next(e, "up projection")?, next(e, "down projection")?);
        Ok(PackedExpert { gate, up, down, up_input, down_input, norm, stored_bytes })
    });
    whole.collect()
}
