//! Stand-ins: a kernel in soiled memory, an exchange whose combine reduces, a pool that counts.

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

/// A real kernel in memory that holds NaN before it runs: nothing of it may come out.
#[derive(Debug)]
pub(super) struct Soiled(pub(super) Box<dyn Experts>);

impl Experts for Soiled {
    fn desc(&self) -> &'static KernelDesc {
        self.0.desc()
    }

    fn shape(&self) -> ExpertShape {
        self.0.shape()
    }

    fn scratch_bytes(&self, slots: usize, threads: usize) -> usize {
        self.0.scratch_bytes(slots, threads)
    }

    fn weight_bytes(&self, plan: &Plan) -> usize {
        self.0.weight_bytes(plan)
    }

    fn forward(&self, call: ExpertCall<'_>) -> Result<()> {
        let ExpertCall { plan, out, pool, arena, .. } = call;
        assert_eq!(out.len(), plan.slots_planned() * self.shape().hidden);
        out.fill(f32::NAN);
        arena.reserve(self.scratch_bytes(plan.slots_planned(), pool.threads()));
        let bytes = arena.bytes();
        arena.cut().bytes(bytes).fill(0xff);
        self.0.forward(ExpertCall { out, arena, ..call })
    }
}

/// Puts `change` around the runner's modular kernel; the exchange stays.
pub(super) fn change_kernel(
    runner: &mut MoeRunner,
    spare: QuantMethod,
    change: impl FnOnce(Box<dyn Experts>) -> Box<dyn Experts>,
) {
    let QuantMethod { kernel, exchange, shared } = runner.replace_quant_method(spare).unwrap();
    let BuiltKernel::Modular(kernel) = kernel else { panic!("a modular kernel is needed") };
    let kernel = BuiltKernel::Modular(change(kernel));
    runner.replace_quant_method(QuantMethod { kernel, exchange, shared }).unwrap();
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

    fn map(&self) -> (&ExpertMap, usize) {
        self.inner.map()
    }

    fn workspace_bytes(&self, tokens: usize, top_k: usize, width: usize) -> usize {
        self.inner.workspace_bytes(tokens, top_k, width)
    }

    fn moves_rows(&self) -> bool {
        false
    }

    fn start_dispatch(
        &mut self,
        lane: usize,
        rows: LocalRows<'_>,
        pool: &dyn ThreadPool,
    ) -> Result<()> {
        self.inner.start_dispatch(lane, rows, pool)
    }

    fn finish_dispatch<'a>(
        &'a mut self,
        lane: usize,
        rows: LocalRows<'a>,
        pool: &dyn ThreadPool,
    ) -> Result<DispatchedRows<'a>> {
        self.inner.finish_dispatch(lane, rows, pool)
    }

    fn start_combine(
        &mut self,
        lane: usize,
        slots: SlotRows<'_>,
        pool: &dyn ThreadPool,
    ) -> Result<()> {
        self.inner.start_combine(lane, slots, pool)
    }

    fn finish_combine(
        &mut self,
        lane: usize,
        rows: LocalRows<'_>,
        slots: SlotRows<'_>,
        out: &mut [f32],
        pool: &dyn ThreadPool,
    ) -> Result<Completeness> {
        let _ = self.inner.finish_combine(lane, rows, slots, out, pool)?;
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
