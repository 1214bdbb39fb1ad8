//! A GPU in use: kernels, stream and working memory, shared by all layers on it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use moe_cuda::{
    Arena, Compiler, Event, FaultWord, Gpu, Modules, Plan, SlotVerbs, Stream, Verbs,
    fault::FaultKind,
};

use super::products::FastWork;
use super::ranks::RanksWork;
use crate::{Error, Result};

/// See the module.
pub(super) struct Device {
    pub(super) gpu: Gpu,
    pub(super) modules: Modules,
    pub(super) verbs: Verbs,
    pub(super) slots: SlotVerbs,
    pub(super) stream: Stream,
    /// For what runs beside it.
    pub(super) beside: Beside,
    work: Mutex<Work>,
}

/// A device, and the stream of it that steps are put on.
pub(super) type On<'a> = (&'a Device, &'a Stream);

/// A second stream: what is put on it begins where the first one has come to, and is waited for.
pub(super) struct Beside {
    pub(super) stream: Stream,
    begun: Event,
    done: Event,
}

impl Beside {
    /// What is put on the second stream from here on begins after what is on `stream` now. One fork at a time.
    pub(super) fn fork<'a>(&'a self, stream: &'a Stream) -> Result<Forked<'a>> {
        stream.record(&self.begun).and_then(|()| self.stream.wait(&self.begun)).map_err(error)?;
        Ok(Forked { beside: self, stream })
    }
}

/// Until this goes, what runs on the first stream runs beside the second one. Also a pass that fails half-way waits:
/// the next one uses the same memory.
pub(super) struct Forked<'a> {
    beside: &'a Beside,
    stream: &'a Stream,
}

impl Forked<'_> {
    /// What is put on the first stream from here on begins when the second one is done.
    pub(super) fn join(self) -> Result<()> {
        let joined = self.wait();
        std::mem::forget(self);
        joined.map_err(error)
    }

    fn wait(&self) -> moe_cuda::Result<()> {
        self.beside.stream.record(&self.beside.done)?;
        self.stream.wait(&self.beside.done)
    }
}

impl Drop for Forked<'_> {
    fn drop(&mut self) {
        // the error that ended the pass is told
        let _ = self.wait();
    }
}

/// What passes work in, one at a time.
pub(super) struct Work {
    pub(super) arena: Arena,
    pub(super) plans: Plans,
    pub(super) fast: FastWork,
    /// Both, of what runs beside the rest.
    pub(super) beside: (Plans, FastWork),
    pub(super) ranks: RanksWork,
    /// What is wrong with the rows.
    pub(super) fault: FaultWord,
    /// What is nobody's fault: it is never read.
    pub(super) ignored: FaultWord,
}

/// Plans by number of experts and rows of a tile, each for the largest batch so far.
#[derive(Default)]
pub(super) struct Plans(Vec<Plan>);

impl Plans {
    /// A plan for batches of `slots` slots.
    pub(super) fn reserve(
        &mut self,
        gpu: &Gpu,
        slots: usize,
        experts: usize,
        tile: usize,
    ) -> Result<&mut Plan> {
        let known = self.0.iter().position(|p| (p.experts(), p.tile()) == (experts, tile));
        let at = match known {
            Some(at) if self.0[at].slots() >= slots => at,
            known => {
                let plan = Plan::new(gpu, slots.max(1), experts, tile).map_err(error)?;
                match known {
                    Some(at) => self.0[at] = plan,
                    None => self.0.push(plan),
                }
                known.unwrap_or(self.0.len() - 1)
            }
        };
        Ok(&mut self.0[at])
    }
}

/// GPU `index`, taken into use unless a layer of this process has it already.
pub(super) fn device(index: usize) -> Result<Arc<Device>> {
    static DEVICES: Mutex<Vec<(usize, Weak<Device>)>> = Mutex::new(Vec::new());
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    devices.retain(|(_, device)| device.strong_count() > 0);
    let known = devices.iter().find(|(known, _)| *known == index);
    if let Some(device) = known.and_then(|(_, device)| device.upgrade()) {
        return Ok(device);
    }
    let device = Arc::new(Device::open(index).map_err(error)?);
    devices.push((index, Arc::downgrade(&device)));
    Ok(device)
}

/// See [`super::capability`].
pub(super) fn capability(index: usize) -> Result<u32> {
    let (major, minor) = Gpu::new(index).map_err(error)?.properties().capability;
    Ok(major * 10 + minor)
}

impl Device {
    fn open(index: usize) -> moe_cuda::Result<Self> {
        let gpu = Gpu::new(index)?;
        let library = std::env::var_os("NVRTC").map(PathBuf::from);
        let compiler = Compiler::open(library.as_deref())?;
        let modules = Modules::new(&gpu, compiler, Modules::user_cache());
        let stream = Stream::new(&gpu)?;
        Ok(Self {
            verbs: Verbs::new(&modules)?,
            slots: SlotVerbs::new(&modules)?,
            work: Mutex::new(Work {
                arena: Arena::new(&gpu)?,
                plans: Plans::default(),
                fast: FastWork::default(),
                beside: Default::default(),
                ranks: RanksWork::default(),
                fault: FaultWord::new(&gpu, &stream)?,
                ignored: FaultWord::new(&gpu, &stream)?,
            }),
            beside: Beside {
                stream: Stream::new(&gpu)?,
                begun: Event::new(&gpu)?,
                done: Event::new(&gpu)?,
            },
            stream,
            modules,
            gpu,
        })
    }

    /// The working memory, for as long as a pass is being put on the stream.
    pub(super) fn work(&self) -> MutexGuard<'_, Work> {
        // a pass writes what it reads: what a panic leaves is whole
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the stream; then an error if a kernel met a fault of the rows.
    pub(super) fn check(&self, work: &mut Work) -> Result<()> {
        work.fault.check(&self.stream).map_err(error)
    }
}

/// An error of the device as one of this crate's.
pub(super) fn error(error: moe_cuda::Error) -> Error {
    match error {
        moe_cuda::Error::Fault(fault) => {
            let what = match fault.kind() {
                FaultKind::Hidden => "hidden_states",
                FaultKind::Logit => "router logits",
                FaultKind::TokenId => "input ids",
                FaultKind::ExpertId => "expert ids",
                FaultKind::Output => "output",
                FaultKind::Capacity | FaultKind::Rank => "exchange",
            };
            Error::input(what, fault.reason())
        }
        moe_cuda::Error::Input { what, reason } => Error::Input { what, reason },
        other => Error::Device(other.to_string()),
    }
}
