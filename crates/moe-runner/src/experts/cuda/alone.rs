//! Experts alone, for a layer that is split over ranks: this rank's experts on its GPU, everything else
//! on the host.
//!
//! Rows come from the exchange and go back to it in host memory. Each planned slot is a row of its own
//! here, with one expert: what comes back does not depend on the other rows, nor on where experts are.
//!
//! ```text
//! gather on the host  x [places, H] → GPU · products · y [places, H] → host
//! ```

use std::sync::Arc;

use bytemuck::cast_slice_mut;
use moe_cuda::{Cut, Float, Rows, ViewMut};
use moe_kernels::arena::room;
use moe_kernels::region::for_each;

use super::Method;
use super::device::{Device, Work, device, error};
use super::layer::Experts;
use super::pass::f32_rows;
use super::pass::memory::Slots;
use super::upload::Upload;
use crate::experts::reference::stored_bytes;
use crate::experts::{self, BuildCall, ExpertCall, ExpertShape, KernelDesc};
use crate::plan::Plan;
use crate::spec::{ExpertSpec, WeightOn};
use crate::weights::Expert;
use crate::{Error, Result};

/// See the module.
pub(super) struct CudaExperts {
    desc: &'static KernelDesc,
    device: Arc<Device>,
    /// None on a rank that has none.
    experts: Option<Experts>,
    weight_on_input: bool,
    /// Bytes of each, as stored.
    stored: Vec<usize>,
}

/// What a pass works in on the device.
struct Parts<'a> {
    x: ViewMut<'a, f32>,
    ids: ViewMut<'a, u32>,
    ones: ViewMut<'a, f32>,
    y: ViewMut<'a, f32>,
    slots: Slots<'a>,
}

impl<'a> Parts<'a> {
    fn cut(cut: &mut Cut<'a>, experts: &Experts, places: usize) -> Self {
        Self {
            x: cut.take(places * experts.hidden()),
            ids: cut.take(places),
            ones: cut.take(places),
            y: cut.take(places * experts.hidden()),
            slots: Slots::cut(cut, experts, places, 1),
        }
    }
}

impl CudaExperts {
    /// Uploads the experts of `call`. Shared ones beside a fast kernel that are in another format are
    /// computed in f32.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no such GPU or it has not enough memory; [`Error::NoKernel`] for
    /// what no kernel computes.
    pub(super) fn new(
        desc: &'static KernelDesc,
        method: Method,
        call: BuildCall<'_>,
    ) -> Result<Self> {
        let BuildCall { spec, weight_on, experts, gpu, pool, progress, .. } = call;
        let device = device(gpu)?;
        let stored = experts.iter().map(stored_bytes).collect();
        let method = if fits(method, spec, &experts) { method } else { Method::F32 };
        let experts = match experts.is_empty() {
            true => None,
            false => {
                let mut upload = Upload::new(&device, pool, progress, 3 * experts.len())?;
                let of = (&*device, method);
                Some(Experts::new(&mut upload, of, spec, weight_on, experts, None)?)
            }
        };
        let weight_on_input = weight_on == WeightOn::Input;
        Ok(Self { desc, device, experts, weight_on_input, stored })
    }
}

/// Whether the kernels of `method` compute these experts.
fn fits(method: Method, spec: &ExpertSpec, experts: &[Expert]) -> bool {
    match method {
        Method::F32 => true,
        Method::Sm90(format) => spec.gated && format.takes(experts),
    }
}

impl std::fmt::Debug for CudaExperts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (name, gpu) = (self.desc.name, &self.device.gpu);
        write!(f, "{name} with {} experts alone on {gpu:?}", self.stored.len())
    }
}

impl experts::Experts for CudaExperts {
    fn desc(&self) -> &'static KernelDesc {
        self.desc
    }

    fn shape(&self) -> ExpertShape {
        ExpertShape {
            experts: self.stored.len(),
            hidden: self.experts.as_ref().map_or(0, Experts::hidden),
            intermediate: self.experts.as_ref().map_or(0, Experts::intermediate),
        }
    }

    fn scratch_bytes(&self, slots: usize, _threads: usize) -> usize {
        room::<f32>(slots * self.shape().hidden) + room::<f32>(slots)
    }

    fn weight_bytes(&self, plan: &Plan) -> usize {
        plan.active().map(|expert| self.stored[expert]).sum()
    }

    fn forward(&self, call: ExpertCall<'_>) -> Result<()> {
        let ExpertCall { rows, plan, weights, out, row_max, pool, arena: scratch, .. } = call;
        if row_max.is_some() {
            let name = self.desc.name;
            return Err(Error::NoKernel(format!(
                "'{name}' cannot agree with other ranks on the scale of a row that is cut into slices"
            )));
        }
        let places = plan.slots_planned();
        let (Some(experts), true) = (&self.experts, places > 0) else { return Ok(()) };
        let hidden = experts.hidden();
        scratch.reserve(self.scratch_bytes(places, 1));
        let mut cut = scratch.cut();
        let x = cut.floats(places * hidden);
        let ids: &mut [u32] = cast_slice_mut(cut.floats(places));
        let planned = plan.planned();
        let into = x.chunks_exact_mut(hidden).zip(&mut *ids).enumerate();
        for_each(pool, into, |(place, (x, id))| {
            let slot = planned[place];
            x.copy_from_slice(&rows[plan.row(slot) * hidden..][..hidden]);
            if self.weight_on_input {
                x.iter_mut().for_each(|value| *value *= weights[slot as usize]);
            }
            *id = plan.expert(place) as u32;
        });

        let device = &*self.device;
        let (gpu, stream) = (&device.gpu, &device.stream);
        let mut work = device.work();
        let Work { arena, plans, fast, ignored, .. } = &mut *work;
        let bytes = Cut::measure(|cut| {
            Parts::cut(cut, experts, places);
        });
        arena.reserve(gpu, bytes).map_err(error)?;
        let mut parts = Parts::cut(&mut arena.cut(), experts, places);
        stream.copy_in(x, parts.x.reborrow()).map_err(error)?;
        stream.copy_in(ids, parts.ids.reborrow()).map_err(error)?;
        device.slots.fill(stream, 1.0, parts.ones.reborrow()).map_err(error)?;
        let x = Rows::new(parts.x.as_view(), Float::F32, places, hidden).map_err(error)?;
        let of = (x, parts.ids.as_view(), Some(parts.ones.as_view()), 1.0);
        let mut y = f32_rows(parts.y.reborrow(), places, hidden)?;
        experts.run((device, stream), of, &mut parts.slots, (plans, fast), &mut y, ignored)?;
        stream.copy_out(parts.y.as_view(), out).map_err(error)
    }
}
