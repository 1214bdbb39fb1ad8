//! Experts that go from GPU to GPU while a layer is served: as their kernels hold them, straight from one GPU's memory to
//! the other's by NCCL, on a stream of its own. The order of the steps is [`moves`](crate::exchange::moves)'.
//!
//! Passes read the old memory until the new one takes its place, all at once, between two of them; the old goes when the
//! passes before are done with it.

use std::sync::Arc;

use moe_cuda::{Buffer, Event, ExpertArray, Homes, Leg, RowQuantiser, Stream, View, ViewMut};

use super::device::{Device, error};
use super::layer::{CudaLayer, Experts};
use super::ranks::{Ranks, no_memory};
use crate::comm::Step;
use crate::exchange::ExpertMap;
use crate::exchange::moves::{Moves, Shelf, carry};
use crate::router::LocalId;
use crate::{Error, Result};

/// Experts on their way.
pub(super) struct Moving {
    map: Arc<ExpertMap>,
    experts: Experts,
    homes: Homes,
    /// Bytes of each expert, as stored.
    stored: Vec<usize>,
    stream: Stream,
    arrived: Event,
}

/// What passes have used, until they are done with it.
pub(super) struct Retired {
    done: Event,
    _experts: Experts,
    _homes: Homes,
}

impl Retired {
    /// No pass uses it any more.
    fn is_done(&self) -> bool {
        self.done.is_reached().unwrap_or(true)
    }
}

impl CudaLayer {
    /// See [`LayerKernel::start_move`](crate::experts::LayerKernel::start_move).
    pub(super) fn move_to(&mut self, map: &Arc<ExpertMap>) -> Result<()> {
        let moving = self.carry(map).inspect_err(|error| {
            if let Some(ranks) = &self.ranks {
                // the others must not wait for this rank, nor go on with a placement that it does not have
                ranks.group().abort(&format!("layer '{}': {error}", self.name));
            }
        })?;
        self.moving = Some(moving);
        Ok(())
    }

    fn carry(&mut self, map: &Arc<ExpertMap>) -> Result<Moving> {
        let Some(ranks) = &self.ranks else {
            return Err(Error::input("expert placement", "all experts are on this GPU"));
        };
        if self.moving.is_some() {
            return Err(Error::input("expert placement", "experts are on their way already"));
        }
        self.retired.retain(|retired| !retired.is_done());
        let device = &*self.device;
        let (stream, arrived) =
            (Stream::new(&device.gpu).map_err(error)?, Event::new(&device.gpu).map_err(error)?);
        stream.set_layer(self.name.clone());
        let moves = Moves::new(ranks.map(), map, ranks.homes().me())?;
        let stored = stored_under(ranks, &self.stored.0, map)?;
        // waits for the stream, on which nothing is yet
        let homes = ranks.homes_of(&stream, map)?;
        let mut shelf = Shelves {
            device,
            ranks,
            stream: &stream,
            old: &self.experts,
            from: self.experts.arrays(),
            new: None,
            to: Vec::new(),
        };
        carry(&mut shelf, &moves)?;
        let experts = shelf.new.ok_or_else(no_memory)?;
        stream.record(&arrived).map_err(error)?;
        Ok(Moving { map: map.clone(), experts, homes, stored, stream, arrived })
    }

    /// See [`LayerKernel::finish_move`](crate::experts::LayerKernel::finish_move).
    pub(super) fn use_moved(&mut self) -> Result<Arc<ExpertMap>> {
        let (Some(moving), Some(ranks)) = (self.moving.take(), &mut self.ranks) else {
            return Err(Error::input("expert placement", "no experts are on their way"));
        };
        let Moving { map, experts, homes, stored, stream, arrived } = moving;
        let pass = &self.device.stream;
        let done = Event::new(&self.device.gpu).map_err(error)?;
        pass.record(&done).and_then(|()| pass.wait(&arrived)).map_err(error)?;
        // its work is done before it goes
        drop(stream);
        let homes = ranks.replace(map.clone(), homes)?;
        let experts = std::mem::replace(&mut self.experts, experts);
        self.stored.0 = stored;
        self.retired.push(Retired { done, _experts: experts, _homes: homes });
        Ok(map)
    }
}

impl Experts {
    /// The same for so many experts, whose weights are anything yet.
    pub(super) fn with_room(&self, device: &Device, experts: usize) -> Result<Self> {
        let room = |each: &Buffer<f32>| {
            let len = each.len() / self.count() * experts;
            Buffer::new(&device.gpu, len, "moved weights").map_err(error)
        };
        let quantise = |of: &Option<(RowQuantiser, Option<Buffer<f32>>)>| {
            let with = |(quantiser, scales): &(RowQuantiser, Option<Buffer<f32>>)| {
                Ok::<_, Error>((*quantiser, scales.as_ref().map(room).transpose()?))
            };
            of.as_ref().map(with).transpose()
        };
        let [first, second] = &self.quantise;
        let norm = self.norm.as_ref().map(|(norm, weight)| Ok::<_, Error>((*norm, room(weight)?)));
        Ok(Self {
            products: self.products.with_room(device, experts)?,
            quantise: [quantise(first)?, quantise(second)?],
            norm: norm.transpose()?,
            weight_on_input: self.weight_on_input,
        })
    }

    /// All arrays that hold them.
    pub(super) fn arrays(&self) -> Vec<ExpertArray> {
        let mut arrays = self.products.arrays();
        let scales = self.quantise.iter().flatten().filter_map(|(_, scales)| scales.as_ref());
        let norm = self.norm.as_ref().map(|(_, weight)| weight);
        arrays.extend(scales.chain(norm).map(|each| ExpertArray::of(each, self.count())));
        arrays
    }
}

/// Bytes of each of this rank's experts under `map`, as stored: of all ranks' `mine` under the map before.
fn stored_under(ranks: &Ranks, mine: &[usize], map: &ExpertMap) -> Result<Vec<usize>> {
    let (old, me) = (ranks.map(), ranks.homes().me());
    let mine: Vec<u64> = mine[..old.held_by(me).len()].iter().map(|n| *n as u64).collect();
    let all = ranks.group().all_gather_v(ranks.at(Step::MoveWeights), mine)?;
    let of = |id: &crate::router::LogicalId| {
        let home = old.copies(*id).first()?;
        all.part(home.rank).get(home.local.index()).map(|n| *n as usize)
    };
    let stored = map.held_by(me).iter().map(of).collect::<Option<Vec<_>>>();
    stored.ok_or_else(|| Error::input("expert placement", "an expert has no copy"))
}

/// A GPU's memory of experts, and the way to that of others.
struct Shelves<'a> {
    device: &'a Device,
    ranks: &'a Ranks,
    stream: &'a Stream,
    old: &'a Experts,
    from: Vec<ExpertArray>,
    new: Option<Experts>,
    to: Vec<ExpertArray>,
}

/// The part of an expert.
fn part(array: &ExpertArray, at: LocalId) -> u64 {
    array.address + (at.index() * array.step) as u64
}

impl Shelves<'_> {
    fn copy_parts(&self, from: (&[ExpertArray], LocalId), to: LocalId) -> Result<()> {
        for (a, b) in from.0.iter().zip(&self.to) {
            // SAFETY: both arrays have a part of as many bytes at these places; nobody writes the first, nor uses the second.
            let (a, b) = unsafe {
                let from = View::<u8>::from_raw(part(a, from.1), a.bytes);
                (from, ViewMut::from_raw(part(b, to), b.bytes))
            };
            self.stream.copy(a, b).map_err(error)?;
        }
        Ok(())
    }
}

impl Shelf for Shelves<'_> {
    fn make_room(&mut self, places: usize) -> Result<()> {
        // kernels have no sizes without any: a rank without experts has a place that nobody asks for
        let new = self.old.with_room(self.device, places.max(1))?;
        self.to = new.arrays();
        self.new = Some(new);
        Ok(())
    }

    fn keep(&mut self, from: LocalId, to: LocalId) -> Result<()> {
        self.copy_parts((&self.from, from), to)
    }

    fn exchange(&mut self, moves: &Moves) -> Result<()> {
        let legs = |arrays: &[ExpertArray], of: &[(usize, LocalId)]| -> Vec<Leg> {
            let leg = |peer: usize, at: LocalId, array: &ExpertArray| Leg {
                peer,
                address: part(array, at),
                bytes: array.bytes,
            };
            of.iter()
                .flat_map(|(peer, at)| arrays.iter().map(move |array| leg(*peer, *at, array)))
                .collect()
        };
        let mut sends = legs(&self.from, &moves.send).into_iter();
        let mut receives = legs(&self.to, &moves.receive).into_iter();
        let at = self.ranks.at(Step::MoveWeights);
        // SAFETY: the old memory stays until no pass uses it, the new until the stream is done.
        unsafe { self.ranks.peers().start(at, self.stream, &mut sends, &mut receives) }
    }

    fn copy(&mut self, from: LocalId, to: LocalId) -> Result<()> {
        self.copy_parts((&self.to, from), to)
    }
}
