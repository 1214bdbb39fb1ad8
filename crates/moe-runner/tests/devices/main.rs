//! Layers over ranks with GPUs, over plain memory and threads: everything that goes between the ranks but the copies.

mod faults;
#[path = "../host_gpus/mod.rs"]
mod host_gpus;
mod lanes;
#[path = "../layers/mod.rs"]
mod layers;
mod moves;
mod plan;

use std::sync::Arc;

use host_gpus::layer::{Between, runner};
use host_gpus::put::{Memory, Waits};
use moe_runner::Result;
use moe_runner::comm::Communicator;
use moe_runner::exchange::resident::Room;
use moe_runner::exchange::{BetweenGpus, ExpertMap};
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::hidden::{Rows, RowsMut};
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface};
use moe_runner::weights::LoadedLayer;

/// Most rows of a rank.
const MOST: usize = 12;

/// The ways between GPUs; with room for all that can come.
fn ways(top_k: usize) -> [BetweenGpus; 3] {
    let room = Room { slots: MOST * top_k, rows: MOST };
    [BetweenGpus::OneSided, BetweenGpus::Counted, BetweenGpus::WithRoom(room)]
}

fn between(layer: &LoadedLayer, ranks: usize, way: BetweenGpus, lanes: usize) -> Between {
    let sizes = (layer.spec.dims.routed_hidden, layer.spec.router.top_k);
    let all = Arc::new(Memory::all(ranks, lanes, MOST, sizes));
    Between { way, lanes, all, waits: Waits::default() }
}

fn rank(
    layer: &LoadedLayer,
    group: &Arc<dyn Communicator>,
    map: &Arc<ExpertMap>,
    between: &Between,
) -> Result<MoeRunner> {
    let alone = layers::runner(layer, Some("reference"), F32);
    runner(layer, alone, group, map, between.clone())
}

/// A batch: hidden states, what the layer's router chose for them, and what one rank makes of them.
struct Batch {
    hidden: Vec<f32>,
    ids: Vec<i32>,
    weights: Vec<f32>,
    output: Vec<f32>,
}

impl Batch {
    fn new(layer: &LoadedLayer, tokens: usize, seed: u64) -> Self {
        let hidden = layers::rows(F32, tokens, layer.spec.dims.hidden, seed);
        let mut one = layers::runner(layer, Some("reference"), F32);
        let mut output = vec![f32::NAN; hidden.len()];
        let input = ForwardInput::new(Rows::F32(&hidden));
        let (_, report) = layers::reported(&mut one, &input, &mut output);
        let ids = report.routing.ids.iter().map(|id| id.0 as i32).collect();
        Self { hidden, ids, weights: report.routing.weights, output }
    }

    fn forward(&self, runner: &mut MoeRunner) -> Result<Vec<f32>> {
        let mut out = vec![f32::NAN; self.hidden.len()];
        let input = ForwardInput::routed(Rows::F32(&self.hidden), &self.ids, &self.weights);
        runner.forward(&input, RowsMut::F32(&mut out))?;
        Ok(out)
    }
}
