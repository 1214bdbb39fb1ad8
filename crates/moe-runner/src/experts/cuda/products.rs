//! The products of experts on the device: in f32 for any format, or with Hopper's kernels.

use moe_cuda::weights::{Element, ExpertWeights, ScaleType};
use moe_cuda::{
    FewExperts, FewWorkspace, Float, GroupedExperts, ManyExperts, ManyWorkspace, Plan, Rows,
    RowsMut, View,
};

use super::Sm90;
use super::device::{Device, Plans, error};
use crate::spec::WeightFormat;
use crate::weights::{Expert, Matrix};
use crate::{Error, Result};

/// The products, with the weights.
pub(super) enum Products {
    /// In f32, from rows of any float type.
    F32(Box<GroupedExperts>),
    /// Hopper's, from rows of bf16.
    Sm90(Box<Fast>),
}

/// Kernels for few and for many slots; where one is missing the other does it all.
pub(super) struct Fast {
    few: Option<FewExperts>,
    many: Option<ManyExperts>,
    dims: [usize; 3],
}

/// Working memory of the fast kernels by their sizes, each for the largest batch so far. Layers that run
/// one after another share it.
#[derive(Default)]
pub(super) struct FastWork {
    few: Vec<([usize; 2], FewWorkspace)>,
    many: Vec<([usize; 3], ManyWorkspace)>,
}

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

    /// Sizes of experts must be multiples of this.
    fn multiple(self) -> usize {
        match self {
            Self::Bf16 | Self::Mxfp4 => 64,
            Self::Fp8 | Self::Int4 => 128,
        }
    }

    /// Whether shared experts can run as the routed ones do: in the same format, gated, in sizes that
    /// divide.
    pub(super) fn takes(self, experts: &[Expert]) -> bool {
        use crate::spec::{ActivationFormat, Granularity};
        let (format, rows) = match self {
            Self::Bf16 => (WeightFormat::Bf16, ActivationFormat::Unquantised),
            Self::Fp8 => (WeightFormat::Fp8(Granularity::Block), ActivationFormat::Fp8Group),
            Self::Mxfp4 => (WeightFormat::Mxfp4, ActivationFormat::Unquantised),
            Self::Int4 => return false,
        };
        let (_, scales, _) = self.stored();
        let fits = |matrix: &Matrix| {
            matrix.format() == format
                && matrix.input.format() == rows
                && matrix.rows().is_multiple_of(self.multiple())
                && matrix.cols().is_multiple_of(self.multiple())
                && scales.map(|(_, block)| block)
                    == matrix.codes().map(|codes| codes.scales().block())
        };
        experts.iter().all(|expert| {
            expert.gate.as_ref().is_some_and(fits) && fits(&expert.up) && fits(&expert.down)
        })
    }
}

impl Products {
    /// Of these weights, in a format that Hopper's kernels read.
    pub(super) fn fast(device: &Device, format: Sm90, weights: ExpertWeights) -> Result<Self> {
        let (modules, stream) = (&device.modules, &device.stream);
        let dims = [weights.up.experts, weights.hidden(), weights.intermediate()];
        let refused = |refused: moe_cuda::Error| match refused {
            moe_cuda::Error::Input { what, reason } => Error::NoKernel(format!("{what}: {reason}")),
            other => error(other),
        };
        // rows of FP8 are quantised by the one for many alone; 4-bit codes are read by the one for few
        let few = match format {
            Sm90::Fp8 => None,
            _ => Some(FewExperts::new(modules, stream, weights.clone()).map_err(refused)?),
        };
        let many = match format {
            Sm90::Bf16 | Sm90::Fp8 => Some(ManyExperts::new(modules, weights).map_err(refused)?),
            Sm90::Mxfp4 | Sm90::Int4 => None,
        };
        Ok(Self::Sm90(Box::new(Fast { few, many, dims })))
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
            true => slots.min(FewExperts::MOST_SLOTS) * (2 * inner + 4 * hidden),
            // sorted rows, the rows between the products (of FP8 their codes, too) and those after
            false => slots * (4 * hidden + 5 * inner),
        }
    }

    /// Slots and tiles of the plans that batches of so many slots need.
    pub(super) fn plan(&self, slots: usize) -> (usize, usize) {
        match self {
            Self::F32(_) => (slots, GroupedExperts::TILE),
            Self::Sm90(fast) => match fast.is_few(slots) {
                true => (slots.min(FewExperts::MOST_SLOTS), FewExperts::TILE),
                false => (slots, ManyExperts::TILE),
            },
        }
    }
}

impl Fast {
    /// The kernel for few slots runs, in as many parts as it takes.
    fn is_few(&self, slots: usize) -> bool {
        self.many.is_none() || (self.few.is_some() && slots <= FewExperts::MOST_SLOTS)
    }

    /// Makes sure of the working memory.
    pub(super) fn reserve(&self, device: &Device, slots: usize, work: &mut FastWork) -> Result<()> {
        let [_, hidden, inner] = self.dims;
        if self.is_few(slots) {
            let slots = slots.min(FewExperts::MOST_SLOTS);
            let key = [hidden, inner];
            let known = work.few.iter().position(|(known, _)| *known == key);
            if known.is_none_or(|at| work.few[at].1.slots() < slots) {
                let new = FewWorkspace::new(&device.stream, slots, hidden, inner).map_err(error)?;
                replace(&mut work.few, known, (key, new));
            }
        } else if let Some(many) = &self.many {
            let key = self.many_key();
            let known = work.many.iter().position(|(known, _)| *known == key);
            if known.is_none_or(|at| work.many[at].1.slots() < slots) {
                let new = many.workspace(&device.stream, slots).map_err(error)?;
                replace(&mut work.many, known, (key, new));
            }
        }
        Ok(())
    }

    fn many_key(&self) -> [usize; 3] {
        let [_, hidden, inner] = self.dims;
        // FP8 has codes of rows beside them, and no kernel for few slots
        [hidden, inner, usize::from(self.few.is_none())]
    }

    /// `out[t] = Σ_j weights[t, j] · expert(ids[t, j])(x[t])`, for `x` in bf16 and `out` in f32.
    pub(super) fn run(
        &self,
        device: &Device,
        (x, ids, weights): (Rows<'_>, View<'_, u32>, View<'_, f32>),
        plans: &mut Plans,
        work: &mut FastWork,
        out: &mut RowsMut<'_>,
        fault: &moe_cuda::FaultWord,
    ) -> Result<()> {
        let (stream, slots, tokens) = (&device.stream, ids.len(), x.rows());
        let [experts, hidden, inner] = self.dims;
        let top_k = slots / tokens;
        self.reserve(device, slots, work)?;
        if !self.is_few(slots) {
            let key = self.many_key();
            let work = work.many.iter_mut().find(|(known, _)| *known == key);
            if let (Some(many), Some((_, work))) = (&self.many, work) {
                let plan = plans.reserve(&device.gpu, slots, experts, ManyExperts::TILE)?;
                device.verbs.plan(stream, ids, top_k, plan).map_err(error)?;
                return many
                    .forward(stream, x, ids, weights, plan, work, out, fault)
                    .map_err(error);
            }
        }
        let work = work.few.iter_mut().find(|(known, _)| *known == [hidden, inner]);
        let (Some(few), Some((_, work))) = (&self.few, work) else {
            return Err(Error::NoKernel("no kernel for batches of this size".into()));
        };
        let most = FewExperts::MOST_SLOTS / top_k;
        if most == 0 {
            return Err(Error::NoKernel(format!("{top_k} slots a token are too many")));
        }
        let at_once = slots.min(FewExperts::MOST_SLOTS);
        for first in (0..tokens).step_by(most) {
            let count = most.min(tokens - first);
            let part = first * top_k..(first + count) * top_k;
            let (ids, weights) = (ids.part(part.clone()), weights.part(part));
            let x = x.part(first..first + count);
            let mut out = out.part(first..first + count);
            let plan: &mut Plan = plans.reserve(&device.gpu, at_once, experts, FewExperts::TILE)?;
            if ids.len() > FewExperts::OWN_PLAN {
                device.verbs.plan(stream, ids, top_k, plan).map_err(error)?;
            }
            few.forward(stream, x, ids, weights, Some(plan), work, &mut out, fault)
                .map_err(error)?;
        }
        Ok(())
    }

    /// What its rows are.
    pub(super) const ROWS: Float = Float::Bf16;
}

fn replace<T>(all: &mut Vec<T>, at: Option<usize>, new: T) {
    match at {
        Some(at) => all[at] = new,
        None => all.push(new),
    }
}
