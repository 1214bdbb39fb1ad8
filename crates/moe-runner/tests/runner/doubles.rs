//! Stand-ins: a kernel that needs padded rows, an exchange whose combine reduces, a pool that counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use moe_kernels::pool::{Inline, ThreadPool, Work};
use moe_runner::Result;
use moe_runner::comm::{At, Communicator, Step};
use moe_runner::exchange::{
    Completeness, DispatchedRows, Exchange, ExpertMap, LocalExchange, LocalRows, SlotRows,
};
use moe_runner::experts::{BuiltKernel, ExpertCall, ExpertShape, Experts, KERNELS, KernelDesc};
use moe_runner::plan::Plan;
use moe_runner::runner::{MoeRunner, MoeRunnerInterface, QuantMethod};

/// The kernel of this name.
pub(super) fn desc(name: &str) -> &'static KernelDesc {
    KERNELS.iter().find(|kernel| kernel.name == name).unwrap()
}

/// A real kernel behind rows padded to a multiple of 64 columns, which it checks on the way in and
/// fills with NaN on the way out.
#[derive(Debug)]
pub(super) struct Padded(pub(super) Box<dyn Experts>);

impl Experts for Padded {
    fn desc(&self) -> &'static KernelDesc {
        self.0.desc()
    }

    fn shape(&self) -> ExpertShape {
        self.0.shape()
    }

    fn padded_width(&self, hidden: usize) -> usize {
        hidden.next_multiple_of(64)
    }

    fn workspace_bytes(&self, slots: usize) -> usize {
        self.0.workspace_bytes(slots)
    }

    fn weight_bytes(&self, plan: &Plan) -> usize {
        self.0.weight_bytes(plan)
    }

    fn forward(&mut self, call: ExpertCall<'_>) -> Result<()> {
        let ExpertCall { rows, stride, plan, out, .. } = call;
        let width = self.0.shape().hidden;
        assert!(stride.is_multiple_of(64) && stride >= width);
        for row in rows.chunks_exact(stride) {
            assert!(row[width..].iter().all(|v| *v == 0.0), "rows are padded with zeros");
        }
        self.0.forward(ExpertCall { out: &mut *out, ..call })?;
        for &slot in plan.active().flat_map(|e| plan.slots(e)) {
            out[slot as usize * stride..][width..stride].fill(f32::NAN);
        }
        Ok(())
    }
}

/// Puts `change` around the runner's modular kernel; the exchange stays.
pub(super) fn change_kernel(
    runner: &mut MoeRunner,
    spare: QuantMethod,
    change: impl FnOnce(Box<dyn Experts>) -> Box<dyn Experts>,
) {
    let QuantMethod { kernel, exchange } = runner.replace_quant_method(spare).unwrap();
    let BuiltKernel::Modular(kernel) = kernel else { panic!("a modular kernel is needed") };
    let kernel = BuiltKernel::Modular(change(kernel));
    runner.replace_quant_method(QuantMethod { kernel, exchange }).unwrap();
}

/// Rows stay, and the combine sums over the group: its result is complete.
pub(super) struct Reducing {
    inner: LocalExchange,
    group: Arc<dyn Communicator>,
}

impl Reducing {
    /// The experts that `map` gives to this rank of `group`.
    pub(super) fn new(map: Arc<ExpertMap>, rank: usize, group: Arc<dyn Communicator>) -> Self {
        Self { inner: LocalExchange::of(map, rank, Completeness::Partial), group }
    }
}

impl std::fmt::Debug for Reducing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("reducing")
    }
}

impl Exchange for Reducing {
    fn name(&self) -> &'static str {
        "reducing"
    }

    fn experts(&self) -> usize {
        self.inner.experts()
    }

    fn local_experts(&self) -> usize {
        self.inner.local_experts()
    }

    fn moves_rows(&self) -> bool {
        false
    }

    fn start_dispatch(&mut self, lane: usize, rows: LocalRows<'_>) -> Result<()> {
        self.inner.start_dispatch(lane, rows)
    }

    fn finish_dispatch<'a>(
        &'a mut self,
        lane: usize,
        rows: LocalRows<'a>,
    ) -> Result<DispatchedRows<'a>> {
        self.inner.finish_dispatch(lane, rows)
    }

    fn start_combine(&mut self, lane: usize, slots: SlotRows<'_>) -> Result<()> {
        self.inner.start_combine(lane, slots)
    }

    fn finish_combine(
        &mut self,
        lane: usize,
        rows: LocalRows<'_>,
        slots: SlotRows<'_>,
        out: &mut [f32],
    ) -> Result<Completeness> {
        let _ = self.inner.finish_combine(lane, rows, slots, out)?;
        self.group.all_reduce(At::new("reducing exchange", Step::Combine), out)?;
        Ok(Completeness::Complete)
    }
}

/// No threads; counts the calls.
#[derive(Default)]
pub(super) struct CountingPool(AtomicUsize);

impl CountingPool {
    /// The calls since the last question.
    pub(super) fn take(&self) -> usize {
        self.0.swap(0, Ordering::Relaxed)
    }
}

impl ThreadPool for CountingPool {
    fn threads(&self) -> usize {
        1
    }

    fn run(&self, items: usize, work: Work<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
        Inline.run(items, work);
    }
}
