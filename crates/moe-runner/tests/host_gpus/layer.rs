//! A layer on such a GPU, as the runner knows it: experts held as bytes, place by place, and computed by a kernel of the
//! processor; either exchange; experts that move from GPU to GPU. Routing comes from outside.

use std::sync::Arc;

use moe_kernels::arena::Arena;
use moe_kernels::pool::Inline;
use moe_runner::comm::{At, Communicator, Count, Kind, Step};
use moe_runner::exchange::moves::{Moves, Shelf, carry};
use moe_runner::exchange::{AllToAllExchange, BetweenGpus, ExpertMap, Wire, one_sided, resident};
use moe_runner::experts::{
    self, BuiltKernel, ExpertCall, ExpertSet, ExpertShape, Experts, KERNELS, KernelDesc, LayerCall,
    LayerKernel, RoutingSource, StreamOrder,
};
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::hidden::{Rows, RowsMut};
use moe_runner::plan::{NO_PLACE, Plan};
use moe_runner::router::{LocalId, Routing};
use moe_runner::runner::{MoeRunner, MoeRunnerInterface, QuantMethod};
use moe_runner::spec::LayerSpec;
use moe_runner::weights::{Expert, LoadedLayer};
use moe_runner::{Error, Result};

use super::put::{All, Put, Waits};
use super::sent::Sent;
use super::{Compute, Own};

/// The kernel that computes experts.
const KERNEL: &str = "reference";

/// Experts as bytes, place by place, and what computes them.
struct Held {
    bytes: Vec<Vec<u8>>,
    kernel: Option<Box<dyn Experts>>,
}

impl Held {
    fn new(spec: &LayerSpec, bytes: Vec<Vec<u8>>) -> Result<Self> {
        let experts: Vec<Expert> =
            bytes.iter().map(|bytes| Expert::from_bytes(bytes)).collect::<Result<_>>()?;
        let weight_on = spec.router.weight_on;
        let set = ExpertSet { spec: &spec.expert, weight_on, experts: &experts };
        let kernel = match experts.is_empty() {
            true => None,
            false => match experts::build(desc(), set, F32)? {
                BuiltKernel::Modular(kernel) => Some(kernel),
                _ => return Err(Error::NoKernel("not of experts alone".into())),
            },
        };
        Ok(Self { bytes, kernel })
    }
}

impl Compute for Held {
    fn outputs(&self, slots: &[(u32, Vec<f32>)]) -> Vec<Vec<f32>> {
        let Some(kernel) = &self.kernel else {
            assert!(slots.is_empty(), "slots for a rank without experts");
            return Vec::new();
        };
        let (count, width) = (slots.len(), kernel.shape().hidden);
        let rows: Vec<f32> = slots.iter().flat_map(|(_, row)| row.iter().copied()).collect();
        let ids: Vec<LocalId> = slots.iter().map(|(id, _)| LocalId(*id)).collect();
        let mut plan = Plan::default();
        plan.build(&ids, 1, kernel.shape().experts).unwrap();
        let mut out = vec![f32::NAN; plan.slots_planned() * width];
        kernel
            .forward(ExpertCall {
                rows: &rows,
                plan: &plan,
                weights: &vec![1.0; count],
                out: &mut out,
                quantised: false,
                row_max: None,
                pool: &Inline,
                arena: &mut Arena::default(),
            })
            .unwrap();
        let of = |place: &u32| {
            assert!(*place != NO_PLACE, "a slot of an expert that is not here");
            out[*place as usize * width..][..width].to_vec()
        };
        plan.places().iter().map(of).collect()
    }
}

fn desc() -> &'static KernelDesc {
    KERNELS.iter().find(|kernel| kernel.name == KERNEL).unwrap()
}

/// See the module.
pub struct HostGpu {
    group: Arc<dyn Communicator>,
    map: Arc<ExpertMap>,
    spec: LayerSpec,
    way: BetweenGpus,
    lanes: usize,
    all: Arc<All>,
    waits: Waits,
    held: Held,
    moving: Option<(Arc<ExpertMap>, Held)>,
    load: Option<Vec<u64>>,
}

impl std::fmt::Debug for HostGpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {:?}", self.group.rank(), self.way)
    }
}

/// How ranks reach each other.
#[derive(Clone)]
pub struct Between {
    pub way: BetweenGpus,
    pub lanes: usize,
    pub all: Arc<All>,
    pub waits: Waits,
}

/// This rank's runner of `layer`, with its experts where `map` says, over such a GPU.
pub fn runner(
    layer: &LoadedLayer,
    runner: MoeRunner,
    group: &Arc<dyn Communicator>,
    map: &Arc<ExpertMap>,
    Between { way, lanes, all, waits }: Between,
) -> Result<MoeRunner> {
    let (spec, map) = (layer.spec.clone(), map.clone());
    let held = map.held_by(group.rank()).iter().map(|id| layer.experts[id.index()].to_bytes());
    let held = Held::new(&spec, held.collect())?;
    let wire = Wire::of_layer(layer, F32).unquantised();
    let exchange = AllToAllExchange::new(&spec.name, group.clone(), map.clone(), None, wire);
    let group = group.clone();
    let (moving, load) = (None, None);
    let kernel = HostGpu { group, map, spec, way, lanes, all, waits, held, moving, load };
    let (kernel, exchange) = (BuiltKernel::Layer(Box::new(kernel)), Box::new(exchange));
    let mut runner = runner;
    runner.replace_quant_method(QuantMethod { kernel, exchange, shared: None })?;
    Ok(runner)
}

impl LayerKernel for HostGpu {
    fn desc(&self) -> &'static KernelDesc {
        desc()
    }

    fn shape(&self) -> ExpertShape {
        let dims = self.spec.dims;
        ExpertShape {
            experts: self.held.bytes.len(),
            hidden: dims.routed_hidden,
            intermediate: dims.intermediate,
        }
    }

    fn workspace_bytes(&self, _: usize, _: usize) -> usize {
        0
    }

    fn weight_bytes(&self, _: &Routing) -> usize {
        self.held.bytes.iter().map(Vec::len).sum()
    }

    fn reserve(&mut self, _: usize, _: usize) -> Result<()> {
        Ok(())
    }

    fn forward(&mut self, call: LayerCall<'_>) -> Result<()> {
        let (RoutingSource::Finished(ids, weights), Rows::F32(x), RowsMut::F32(out)) =
            (call.source, call.rows, call.out)
        else {
            return Err(Error::input("a GPU's double", "takes f32 rows that are routed"));
        };
        let top_k = ids.len().checked_div(call.tokens).unwrap_or(self.spec.router.top_k);
        let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
        let (group, map, width) = (&self.group, &*self.map, self.spec.dims.routed_hidden);
        let own = Own { group, map, width, top_k, x, ids: &ids, weights };
        match self.way {
            BetweenGpus::OneSided => {
                let mut put = Put::new(own, &self.held, &self.all);
                (put.lanes, put.waits) = (self.lanes, self.waits.clone());
                put.load = self.load.as_mut();
                let lanes = one_sided::run(&mut put, self.lanes)?.len() as u64;
                for (sent, received) in put.moved.into_iter().filter(|_| lanes > 0) {
                    let (sent, received) = (sent as u64, received as u64);
                    group.traffic().add(Kind::AllToAllV, Count { calls: lanes, sent, received });
                }
                out.copy_from_slice(&put.out);
                let spans = put.spans.into_inner().unwrap();
                call.spans.into_iter().for_each(|all| all.extend(&spans));
            }
            way => {
                let room = match way {
                    BetweenGpus::WithRoom(room) => Some(room),
                    _ => None,
                };
                let mut sent = Sent::new(own, &self.held, room, self.lanes);
                (sent.load, sent.before) = (self.load.as_mut(), self.waits.before.clone());
                resident::run(&mut sent, (group.rank(), group.size()), room, self.lanes)?;
                out.copy_from_slice(&sent.out());
            }
        }
        Ok(())
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }

    fn stream(&self) -> usize {
        0
    }

    unsafe fn order(&self, _: usize, _: StreamOrder) -> Result<()> {
        Ok(())
    }

    fn is_spread(&self) -> bool {
        true
    }

    fn start_move(&mut self, map: &Arc<ExpertMap>) -> Result<()> {
        let moves = Moves::new(&self.map, map, self.group.rank())?;
        let mut shelf = Bytes {
            group: &self.group,
            layer: &self.spec.name,
            old: &self.held.bytes,
            new: Vec::new(),
        };
        carry(&mut shelf, &moves)?;
        let held = Held::new(&self.spec, shelf.new)?;
        self.moving = Some((map.clone(), held));
        Ok(())
    }

    fn finish_move(&mut self) -> Result<Arc<ExpertMap>> {
        let moved = self.moving.take();
        let (map, held) =
            moved.ok_or_else(|| Error::input("expert placement", "no experts are on their way"))?;
        (self.map, self.held) = (map.clone(), held);
        Ok(map)
    }

    fn count_load(&mut self, on: bool) -> Result<()> {
        self.load = on.then(|| vec![0; self.map.experts()]);
        Ok(())
    }

    fn take_load(&mut self) -> Result<Vec<u64>> {
        let zeros = vec![0; self.map.experts()];
        let load = self.load.as_mut().map(|load| std::mem::replace(load, zeros));
        load.ok_or_else(|| Error::input("expert load", "nobody counts it"))
    }
}

/// A GPU's memory of experts.
struct Bytes<'a> {
    group: &'a Arc<dyn Communicator>,
    layer: &'a str,
    old: &'a [Vec<u8>],
    new: Vec<Vec<u8>>,
}

impl Shelf for Bytes<'_> {
    fn make_room(&mut self, places: usize) -> Result<()> {
        // what no step fills is no expert
        self.new = vec![vec![0xff; 8]; places];
        Ok(())
    }

    fn keep(&mut self, from: LocalId, to: LocalId) -> Result<()> {
        self.new[to.index()] = self.old[from.index()].clone();
        Ok(())
    }

    fn exchange(&mut self, moves: &Moves) -> Result<()> {
        let (mut data, mut counts) = (Vec::new(), vec![0; self.group.size()]);
        for (to, count) in counts.iter_mut().enumerate() {
            let start = data.len();
            for (_, at) in moves.send.iter().filter(|(rank, _)| *rank == to) {
                data.extend_from_slice(&self.old[at.index()]);
            }
            *count = data.len() - start;
        }
        let at = At::new(self.layer, Step::MoveWeights);
        let received = self.group.all_to_all_v(at, data, &counts)?;
        for (from, part) in received.iter().enumerate() {
            // all experts have as many bytes
            let of = moves.receive.iter().filter(|(rank, _)| *rank == from);
            let each = part.len().checked_div(of.clone().count()).unwrap_or(0);
            for (i, (_, to)) in of.enumerate() {
                self.new[to.index()] = part[i * each..(i + 1) * each].to_vec();
            }
        }
        Ok(())
    }

    fn copy(&mut self, from: LocalId, to: LocalId) -> Result<()> {
        self.new[to.index()] = self.new[from.index()].clone();
        Ok(())
    }
}
