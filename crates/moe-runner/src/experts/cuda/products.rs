//! The products of experts on the device: in f32 for any format, or with Hopper's kernels.

use moe_cuda::weights::{Element, ExpertWeights, ScaleType};
use moe_cuda::{
    ExpertArray, FewBatch, FewExperts, FewFormat, FewGate, FewWorkspace, Float, GroupedExperts,
    ManyExperts, ManyWorkspace, Plan, Router, Rows, RowsMut, SlotHomes, SlotOutputs, View,
};

use super::device::{Device, On, Plans, error};
use super::{CUDA_SM90_BF16, CUDA_SM90_FP8, CUDA_SM90_INT4, CUDA_SM90_MXFP4, Sm90, takes};
use crate::experts::KernelDesc;
use crate::weights::Expert;
use crate::{Error, Result};

/// The products, with the weights.
pub(super) enum Products {
    /// In f32, from rows of any float type.
    F32(Box<GroupedExperts>),
    /// Hopper's, from rows of bf16.
    Sm90(Box<Fast>),
}

/// Kernels for few and for many slots.
pub(super) struct Fast {
    few: FewExperts,
    many: ManyExperts,
    dims: [usize; 3],
}

/// Working memory of the fast kernels by their sizes, each for the largest batch so far. Layers that run
/// one after another share it.
#[derive(Default)]
pub(super) struct FastWork {
    few: Vec<(Key, FewWorkspace)>,
    many: Vec<(Key, ManyWorkspace)>,
}

/// Widths of the rows, and the weights' format.
type Key = ([usize; 2], FewFormat);

impl Sm90 {
    /// How the weights are stored on the device: codes, scales, rows and columns that share one, zero.
    pub(super) fn stored(self) -> (Element, Option<(ScaleType, [usize; 2])>, f32) {
        match self {
            Self::Bf16 => (Element::Bf16, None, 0.0),
            Self::Fp8 => (Element::E4m3, Some((ScaleType::F32, [128, 128])), 0.0),
            Self::Mxfp4 => (Element::E2m1, Some((ScaleType::E8m0, [1, 32])), 0.0),
            Self::Int4 => (Element::Uint4, Some((ScaleType::Bf16, [1, 128])), 8.0),
        }
    }

    /// The kernel that reads it.
    fn desc(self) -> &'static KernelDesc {
        match self {
            Self::Bf16 => &CUDA_SM90_BF16,
            Self::Fp8 => &CUDA_SM90_FP8,
            Self::Mxfp4 => &CUDA_SM90_MXFP4,
            Self::Int4 => &CUDA_SM90_INT4,
        }
    }

    /// Whether shared experts can run as the routed ones do: in the same format, gated, in sizes that
    /// divide.
    pub(super) fn takes(self, experts: &[Expert]) -> bool {
        takes(self.desc(), experts)
    }
}

impl Products {
    /// Of these weights, stored as [`Sm90::stored`] says; `gate`: behind a gate with
    /// this router.
    pub(super) fn fast(
        device: &Device,
        weights: ExpertWeights,
        gate: Option<&Router>,
    ) -> Result<Self> {
        let (modules, stream) = (&device.modules, &device.stream);
        let dims = [weights.up.experts, weights.hidden(), weights.intermediate()];
        let refused = |refused: moe_cuda::Error| match refused {
            moe_cuda::Error::Input { what, reason } => Error::NoKernel(format!("{what}: {reason}")),
            other => error(other),
        };
        let mut few = FewExperts::new(modules, stream, weights).map_err(refused)?;
        if let Some(router) = gate {
            few = few.with_gate(modules, router).map_err(refused)?;
        }
        let many = ManyExperts::beside(modules, &few).map_err(refused)?;
        Ok(Self::Sm90(Box::new(Fast { few, many, dims })))
    }

    /// The same for so many experts, whose weights are anything yet.
    pub(super) fn with_room(&self, device: &Device, experts: usize) -> Result<Self> {
        let modules = &device.modules;
        Ok(match self {
            Self::F32(grouped) => {
                Self::F32(Box::new(grouped.with_room(modules, experts).map_err(error)?))
            }
            Self::Sm90(fast) => {
                let few = fast.few.with_room(modules, experts).map_err(error)?;
                let many = ManyExperts::beside(modules, &few).map_err(error)?;
                let [_, hidden, inner] = fast.dims;
                Self::Sm90(Box::new(Fast { few, many, dims: [experts, hidden, inner] }))
            }
        })
    }

    /// All arrays that hold the experts.
    pub(super) fn arrays(&self) -> Vec<ExpertArray> {
        match self {
            Self::F32(grouped) => grouped.arrays(),
            Self::Sm90(fast) => fast.few.arrays(),
        }
    }

    /// Experts, width of rows, width between the products.
    pub(super) fn dims(&self) -> [usize; 3] {
        match self {
            Self::F32(grouped) => {
                let weights = grouped.weights();
                [weights.up.experts, weights.hidden(), weights.intermediate()]
            }
            Self::Sm90(fast) => fast.dims,
        }
    }

    /// Bytes of working memory for batches of so many slots, beside the pass's own.
    pub(super) fn work_bytes(&self, slots: usize) -> usize {
        let Self::Sm90(fast) = self else { return 0 };
        let [_, hidden, inner] = fast.dims;
        match fast.is_few(slots) {
            true => FewExperts::work_bytes(fast.few.format(), slots, hidden, inner),
            false => ManyExperts::work_bytes(fast.few.format(), slots, hidden, inner),
        }
    }

    /// Slots and tiles of the plans that batches of so many slots need.
    pub(super) fn plan(&self, slots: usize) -> (usize, usize) {
        match self {
            Self::F32(_) => (slots, GroupedExperts::TILE),
            Self::Sm90(fast) => match fast.is_few(slots) {
                true => (slots, FewExperts::TILE),
                false => (slots, ManyExperts::TILE),
            },
        }
    }
}

impl Products {
    /// Rows of a tile of the plans that products of sorted slots need, however few.
    pub(super) fn many_tile(&self) -> usize {
        match self {
            Self::F32(_) => GroupedExperts::TILE,
            Self::Sm90(_) => ManyExperts::TILE,
        }
    }
}

impl Fast {
    /// The outputs of planned slots, by slot, each of its row of `x`; see [`ManyExperts::slots`]. The kernel for many
    /// runs, however few they are: so a slot's output does not depend on how many are here.
    ///
    /// # Safety
    /// Those rows are rows of `x`.
    pub(super) unsafe fn slots(
        &self,
        device: &Device,
        x: Rows<'_>,
        rows: View<'_, u32>,
        plan: &Plan,
        work: &mut FastWork,
    ) -> Result<SlotOutputs> {
        let (stream, key) = (&device.stream, self.key());
        self.reserve_many(device, rows.len(), work)?;
        let work = known(&mut work.many, key)?;
        // SAFETY: as the caller promises.
        unsafe { self.many.slots(stream, x, rows, plan, work) }.map_err(error)
    }

    /// The outputs of planned slots to `homes`; see [`ManyExperts::slots_to`]. Otherwise as [`Self::slots`].
    ///
    /// # Safety
    /// There is memory for the outputs, and nothing else uses it meanwhile.
    pub(super) unsafe fn slots_to(
        &self,
        device: &Device,
        x: Rows<'_>,
        plan: &Plan,
        homes: SlotHomes<'_>,
        work: &mut FastWork,
    ) -> Result<()> {
        let work = known(&mut work.many, self.key())?;
        // SAFETY: as the caller promises.
        unsafe { self.many.slots_to(&device.stream, x, plan, work, homes) }.map_err(error)
    }

    /// Outputs of so many slots that nobody has computed: memory to copy from.
    pub(super) fn no_outputs(&self, work: &mut FastWork) -> Result<SlotOutputs> {
        Ok(self.many.outputs(known(&mut work.many, self.key())?))
    }

    /// What the output of a slot is.
    pub(super) fn output_of_slot(&self) -> SlotOutputs {
        self.many.output_of_slot()
    }

    /// Makes sure of the memory of the kernel for many slots.
    pub(super) fn reserve_many(
        &self,
        device: &Device,
        slots: usize,
        work: &mut FastWork,
    ) -> Result<()> {
        let key = self.key();
        let at = work.many.iter().position(|(known, _)| *known == key);
        if at.is_none_or(|at| work.many[at].1.slots() < slots) {
            // the old memory goes first
            if let Some(at) = at {
                work.many.swap_remove(at);
            }
            let new = self.many.workspace(&device.stream, slots).map_err(error)?;
            work.many.push((key, new));
        }
        Ok(())
    }

    /// The kernel for few slots runs: it reads an expert's weights once for each 8 of its rows.
    fn is_few(&self, slots: usize) -> bool {
        slots <= FewExperts::MOST_SLOTS && slots < 2 * FewExperts::TILE * self.dims[0]
    }

    fn key(&self) -> Key {
        let [_, hidden, inner] = self.dims;
        ([hidden, inner], self.few.format())
    }

    /// Makes sure of the working memory.
    pub(super) fn reserve(&self, device: &Device, slots: usize, work: &mut FastWork) -> Result<()> {
        let key = self.key();
        let stream = &device.stream;
        if self.is_few(slots) {
            let at = work.few.iter().position(|(known, _)| *known == key);
            if at.is_none_or(|at| work.few[at].1.slots() < slots) {
                let new = self.few.workspace(stream, slots).map_err(error)?;
                replace(&mut work.few, at, (key, new));
            }
            return Ok(());
        }
        self.reserve_many(device, slots, work)
    }

    /// Whether gate, routing and experts of such a batch are one launch.
    pub(super) fn takes_gate(&self, x: &Rows<'_>, gate: &Rows<'_>, router: &Router) -> bool {
        let slots = x.rows() * router.options().top_k;
        self.is_few(slots) && self.few.takes_gate(x.rows(), x, gate, router)
    }

    /// That launch; see [`FewExperts::forward_gated`].
    pub(super) fn run_gated(
        &self,
        device: &Device,
        gate: FewGate<'_>,
        batch: (Rows<'_>, f32, &moe_cuda::FaultWord),
        work: &mut FastWork,
        out: &mut RowsMut<'_>,
    ) -> Result<()> {
        let slots = gate.routing.ids.len();
        self.reserve(device, slots, work)?;
        let work = known(&mut work.few, self.key())?;
        self.few.forward_gated(&device.stream, gate, batch, work, out).map_err(error)
    }

    /// `out[t] = factor · Σ_j weights[t, j] · expert(ids[t, j])(x[t])`, for `x` in bf16 and `out` in f32 or
    /// bf16.
    pub(super) fn run(
        &self,
        on @ (device, stream): On<'_>,
        batch: &FewBatch<'_>,
        plans: &mut Plans,
        work: &mut FastWork,
        out: &mut RowsMut<'_>,
    ) -> Result<()> {
        let (slots, key) = (batch.ids.len(), self.key());
        self.reserve(device, slots, work)?;
        if !self.is_few(slots) {
            let plan = self.planned(on, batch, ManyExperts::TILE, plans)?;
            let work = known(&mut work.many, key)?;
            return self.many.forward(stream, batch, plan, work, out).map_err(error);
        }
        let plan = match slots > FewExperts::OWN_PLAN {
            true => Some(self.planned(on, batch, FewExperts::TILE, plans)?),
            false => None,
        };
        let work = known(&mut work.few, key)?;
        self.few.forward(stream, batch, plan, work, out).map_err(error)
    }

    /// The batch's plan in tiles of so many rows.
    fn planned<'p>(
        &self,
        (device, stream): On<'_>,
        batch: &FewBatch<'_>,
        tile: usize,
        plans: &'p mut Plans,
    ) -> Result<&'p Plan> {
        let slots = batch.ids.len();
        let plan = plans.reserve(&device.gpu, slots, self.dims[0], tile)?;
        let top_k = slots / batch.x.rows();
        device.verbs.plan(stream, batch.ids, top_k, plan).map_err(error)?;
        Ok(plan)
    }

    /// What its rows are.
    pub(super) const ROWS: Float = Float::Bf16;
}

fn known<T>(all: &mut [(Key, T)], key: Key) -> Result<&mut T> {
    match all.iter_mut().find(|(known, _)| *known == key) {
        Some((_, work)) => Ok(work),
        None => Err(Error::NoKernel("no memory for batches of this size".into())),
    }
}

fn replace<T>(all: &mut Vec<T>, at: Option<usize>, new: T) {
    match at {
        Some(at) => all[at] = new,
        None => all.push(new),
    }
}
