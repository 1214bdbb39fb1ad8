//! Experts of any stored format: right, not fast.

use crate::module::{Argument, Function, Launch, Modules};
use crate::plan::Plan;
use crate::sources::GROUPED;
use crate::weights::{ExpertArray, ExpertWeights, RawActivation};
use crate::{Error, Result, Rows, RowsMut, Stream, View};

/// Experts of any stored format: every value is decoded to f32 and multiplied in f32, one sum an
/// element, k ascending, whatever rows are beside it. Right, not fast.
pub struct GroupedExperts {
    weights: ExpertWeights,
    first: Function,
    second: Function,
}

#[repr(C)]
struct RawWork {
    offsets: u64,
    order: u64,
    tiles: u64,
    tile_count: u64,
    top_k: u32,
    padding: u32,
}

// SAFETY: `struct Work` of grouped.cu.
unsafe impl Argument for RawWork {}

impl GroupedExperts {
    /// Rows of a plan's tile for these products.
    pub const TILE: usize = 32;

    /// Experts of these weights.
    ///
    /// # Errors
    /// If the projections do not fit each other or their bytes, or a kernel does not compile.
    pub fn new(modules: &Modules, weights: ExpertWeights) -> Result<Self> {
        weights.check()?;
        let first = modules.function(&GROUPED, &weights.up.element.options(), "grouped_first")?;
        let second =
            modules.function(&GROUPED, &weights.down.element.options(), "grouped_second")?;
        Ok(Self { weights, first, second })
    }

    /// The same for so many experts, whose weights are anything yet: to be copied into [`Self::arrays`].
    ///
    /// # Errors
    /// As [`Self::new`]; or if there is not enough memory.
    pub fn with_room(&self, modules: &Modules, experts: usize) -> Result<Self> {
        Self::new(modules, self.weights.with_room(modules.gpu(), experts)?)
    }

    /// All arrays that hold the experts.
    pub fn arrays(&self) -> Vec<ExpertArray> {
        self.weights.arrays()
    }

    /// The weights.
    pub fn weights(&self) -> &ExpertWeights {
        &self.weights
    }

    /// The first product and the activation: row `p` of `h` `[slots, I]` belongs to the p-th slot of
    /// the plan. With `factors` `[T, k]`, a slot's row of `x` `[T, H]` is multiplied first.
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    pub fn first(
        &self,
        stream: &Stream,
        x: Rows<'_>,
        plan: &Plan,
        factors: Option<View<'_, f32>>,
        h: &mut RowsMut<'_>,
    ) -> Result<()> {
        x.expect("rows of the experts", plan.slots_used / plan.top_k, self.weights.up.cols)?;
        self.first_of(stream, x, work(plan), plan, factors, h)
    }

    /// The same of rows `x` `[slots, H]` that stand in the order of the plan already.
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    pub fn first_sorted(
        &self,
        stream: &Stream,
        x: Rows<'_>,
        plan: &Plan,
        h: &mut RowsMut<'_>,
    ) -> Result<()> {
        x.expect("sorted rows of the experts", plan.slots_used, self.weights.up.cols)?;
        self.first_of(stream, x, RawWork { top_k: 0, ..work(plan) }, plan, None, h)
    }

    fn first_of(
        &self,
        stream: &Stream,
        x: Rows<'_>,
        work: RawWork,
        plan: &Plan,
        factors: Option<View<'_, f32>>,
        h: &mut RowsMut<'_>,
    ) -> Result<()> {
        let (up, slots) = (&self.weights.up, plan.slots_used);
        self.check_plan(plan)?;
        h.expect("rows between the products", slots, up.rows)?;
        if factors.is_some_and(|factors| factors.len() != slots) {
            return Err(Error::input("weights on the input", "not one a slot"));
        }
        if slots == 0 {
            return Ok(());
        }
        let gate = self.weights.gate.as_ref();
        let activation = RawActivation::new(self.weights.activation, gate.is_some());
        let factors = factors.map_or(0, |factors| factors.pointer);
        let (gate, up_raw) = (gate.unwrap_or(up).raw(), up.raw());
        let launch = launch(up.rows, plan);
        // SAFETY: the parameters of `grouped_first`; weights and rows were checked.
        unsafe {
            self.first.launch(
                stream,
                launch,
                &[&x.raw, &gate, &up_raw, &activation, &work, &factors, &h.raw],
            )
        }
    }

    /// The second product: row `s` of `y` `[slots, H]` belongs to slot s. Slots without an expert are
    /// left as they were.
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    pub fn second(
        &self,
        stream: &Stream,
        h: Rows<'_>,
        plan: &Plan,
        y: &mut RowsMut<'_>,
    ) -> Result<()> {
        let (down, slots) = (&self.weights.down, plan.slots_used);
        self.check_plan(plan)?;
        h.expect("rows between the products", slots, down.cols)?;
        y.expect("rows of the slots", slots, down.rows)?;
        if slots == 0 {
            return Ok(());
        }
        let down_raw = down.raw();
        // SAFETY: the parameters of `grouped_second`; weights and rows were checked.
        unsafe {
            self.second.launch(
                stream,
                launch(down.rows, plan),
                &[&h.raw, &down_raw, &work(plan), &y.raw],
            )
        }
    }

    fn check_plan(&self, plan: &Plan) -> Result<()> {
        if (plan.experts(), plan.tile()) == (self.weights.up.experts, Self::TILE) {
            return Ok(());
        }
        let is = format!("tiles of {} over {} experts", plan.tile(), plan.experts());
        Err(Error::input(
            "plan",
            format!("{is}, not of {} over {}", Self::TILE, self.weights.up.experts),
        ))
    }
}

fn work(plan: &Plan) -> RawWork {
    RawWork {
        offsets: plan.offsets().pointer,
        order: plan.order().pointer,
        tiles: plan.tiles().pointer,
        tile_count: plan.tile_count().pointer,
        top_k: plan.top_k as u32,
        padding: 0,
    }
}

/// Blocks for the most tiles that the batch can have; those without one end at once.
fn launch(features: usize, plan: &Plan) -> Launch {
    let tiles = plan.tiles_for(plan.slots_used).min(65_535);
    Launch {
        grid: (features.div_ceil(64) as u32, tiles as u32),
        block: 256,
        shared: 0,
        cooperative: false,
    }
}
