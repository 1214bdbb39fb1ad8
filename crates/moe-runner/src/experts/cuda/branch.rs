//! The experts of one branch: what both a whole layer and experts alone put on the stream.

use moe_cuda::{FaultWord, FewBatch, GroupedExperts, Plan, Rows, RowsMut, SlotOutputs, View};

use super::device::{Device, On, Plans, error};
use super::layer::Experts;
use super::pass::f32_rows;
use super::pass::memory::Slots;
use super::products::{Fast, FastWork, Products};
use super::ranks::Grown;
use crate::{Error, Result};

/// Rows `[T, H]`, ids `[T, k]`, weights `[T, k]` (none: they are 1), and a factor.
type Of<'a> = (Rows<'a>, View<'a, u32>, Option<View<'a, f32>>, f32);

impl Experts {
    /// `out[t] = factor · Σ_j weights[t, j] · expert(ids[t, j])(x[t])`, in f32.
    pub(super) fn run(
        &self,
        on: On<'_>,
        of: Of<'_>,
        slots: &mut Slots<'_>,
        (plans, work): (&mut Plans, &mut FastWork),
        out: &mut RowsMut<'_>,
        fault: &FaultWord,
    ) -> Result<()> {
        match &self.products {
            Products::F32(grouped) => {
                let (count, all) = (of.1.len(), self.count());
                let plan = plans.reserve(&on.0.gpu, count, all, GroupedExperts::TILE)?;
                self.in_f32((on, grouped), of, slots, plan, out, fault)
            }
            Products::Sm90(fast) => {
                let (x, ids, weights, factor) = of;
                let Some(weights) = weights else {
                    return Err(Error::NoKernel("fast experts need weights".into()));
                };
                let x = self.as_read(on, x, slots)?;
                let batch = FewBatch { x, ids, weights, factor, fault };
                fast.run(on, &batch, plans, work, out)?;
                Ok(())
            }
        }
    }

    /// Rows as the products read them: `x` itself, or its numbers in bf16.
    pub(super) fn as_read<'x>(
        &self,
        (device, stream): On<'_>,
        x: Rows<'x>,
        slots: &'x mut Slots<'_>,
    ) -> Result<Rows<'x>> {
        if !self.is_fast() || x.float() == Fast::ROWS {
            return Ok(x);
        }
        let narrow = slots.narrow.reborrow();
        let mut rows = RowsMut::new(narrow, Fast::ROWS, x.rows(), x.cols()).map_err(error)?;
        device.verbs.convert(stream, x, &mut rows, None).map_err(error)?;
        Ok(rows.into_rows())
    }

    /// The same, the products in f32.
    fn in_f32(
        &self,
        (on @ (device, stream), grouped): (On<'_>, &GroupedExperts),
        of: Of<'_>,
        slots: &mut Slots<'_>,
        plan: &mut Plan,
        out: &mut RowsMut<'_>,
        fault: &FaultWord,
    ) -> Result<()> {
        let (x, ids, weights, factor) = of;
        let verbs = &device.verbs;
        let count = ids.len();
        let (hidden, inner) = (self.hidden(), self.intermediate());
        verbs.plan(stream, ids, count / x.rows(), plan).map_err(error)?;
        let factors = weights.filter(|_| self.weight_on_input);
        let mut h = f32_rows(slots.h.reborrow(), count, inner)?;
        match &self.quantise[0] {
            None => grouped.first(stream, x, plan, factors, &mut h).map_err(error)?,
            Some((quantiser, scales)) => {
                let mut rows = f32_rows(slots.x.reborrow(), count, hidden)?;
                let scales = scales.as_ref().map(|scales| scales.view());
                let verbs = &device.slots;
                verbs.gather(stream, x, plan, factors, &mut rows).map_err(error)?;
                verbs.quantise(stream, *quantiser, scales, plan, &mut rows).map_err(error)?;
                grouped.first_sorted(stream, rows.as_rows(), plan, &mut h).map_err(error)?;
            }
        }
        let mut y = f32_rows(slots.y.reborrow(), count, hidden)?;
        self.second_in_f32((on, grouped), h, (ids, plan), &mut y)?;
        let weights = weights.filter(|_| !self.weight_on_input);
        let (y, all) = (y.as_rows(), self.count());
        verbs.combine(stream, y, ids, weights, all, factor, out, fault).map_err(error)
    }

    /// From the rows between the products to the outputs of slots.
    fn second_in_f32(
        &self,
        ((device, stream), grouped): (On<'_>, &GroupedExperts),
        mut h: RowsMut<'_>,
        (ids, plan): (View<'_, u32>, &Plan),
        y: &mut RowsMut<'_>,
    ) -> Result<()> {
        if let Some((quantiser, scales)) = &self.quantise[1] {
            let scales = scales.as_ref().map(|scales| scales.view());
            device.slots.quantise(stream, *quantiser, scales, plan, &mut h).map_err(error)?;
        }
        grouped.second(stream, h.as_rows(), plan, y).map_err(error)?;
        if let Some((norm, weight)) = &self.norm {
            device.slots.norm(stream, *norm, ids, weight.view(), y).map_err(error)?;
        }
        Ok(())
    }

    /// The outputs `y` `[slots, H]` of slots whose rows stand in the plan's order, in f32; `h` `[slots, I]` is for the
    /// rows between the products.
    pub(super) fn sorted_in_f32(
        &self,
        device: &Device,
        mut rows: RowsMut<'_>,
        mut h: RowsMut<'_>,
        (ids, plan): (View<'_, u32>, &Plan),
        y: &mut RowsMut<'_>,
    ) -> Result<()> {
        let Products::F32(grouped) = &self.products else {
            return Err(Error::NoKernel("these experts are not computed in f32".into()));
        };
        let stream = &device.stream;
        if let Some((quantiser, scales)) = &self.quantise[0] {
            let scales = scales.as_ref().map(|scales| scales.view());
            device.slots.quantise(stream, *quantiser, scales, plan, &mut rows).map_err(error)?;
        }
        grouped.first_sorted(stream, rows.as_rows(), plan, &mut h).map_err(error)?;
        self.second_in_f32(((device, stream), grouped), h, (ids, plan), y)
    }

    /// Outputs of slots that nobody has computed: memory to copy from. `wide` is that of products in f32.
    pub(super) fn no_outputs(&self, fast: &mut FastWork, wide: &Grown<f32>) -> Result<SlotOutputs> {
        match &self.products {
            Products::Sm90(products) => products.no_outputs(fast),
            Products::F32(_) => Ok(SlotOutputs { values: wide.address(), ..self.output_of_slot() }),
        }
    }

    /// What the output of a slot is.
    pub(super) fn output_of_slot(&self) -> SlotOutputs {
        match &self.products {
            Products::Sm90(fast) => fast.output_of_slot(),
            Products::F32(_) => SlotOutputs {
                values: 0,
                value_bytes: 4 * self.hidden(),
                scales: 0,
                scale_bytes: 0,
                tile: 0,
            },
        }
    }
}
