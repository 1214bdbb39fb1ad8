//! Memory of the ranks' GPUs that all ranks of a group write into.

use moe_cuda::{Buffer, Stream, View};

use super::At;
use super::peers::{Peers, Shared};
use crate::{Error, Result};

/// Some buffers of this rank, and the same of all others. Ranks are counted from this one on: number d is rank
/// (me + d) mod R.
pub(crate) struct SharedMemory {
    own: Vec<Buffer<u8>>,
    /// By buffer and number; nothing of other processes stays open for longer.
    all: Vec<Vec<Shared>>,
    /// Their addresses, `[buffers, R]`.
    table: Buffer<u64>,
}

impl SharedMemory {
    /// Buffers of so many bytes, all of them zero. All ranks call this together, with the same sizes; nobody may write
    /// before all have it.
    ///
    /// # Errors
    /// What the driver refuses; a rank that does not come.
    pub(crate) fn new(peers: &Peers, at: At<'_>, stream: &Stream, sizes: &[usize]) -> Result<Self> {
        let mut own = Vec::with_capacity(sizes.len());
        for size in sizes {
            let mut buffer =
                Buffer::new(stream.gpu(), *size, "rows of other ranks").map_err(error)?;
            stream.fill(buffer.view_mut(), 0).map_err(error)?;
            own.push(buffer);
        }
        stream.synchronize().map_err(error)?;
        let all = own.iter().map(|buffer| peers.share(at, buffer)).collect::<Result<Vec<_>>>()?;
        let addresses: Vec<u64> = all.iter().flatten().map(Shared::address).collect();
        let table = Buffer::from_slice(stream, &addresses, "windows").map_err(error)?;
        Ok(Self { own, all, table })
    }

    /// A buffer of this rank.
    pub(crate) fn own(&self, which: usize) -> View<'_, u8> {
        self.own[which].view()
    }

    /// Bytes of each.
    pub(crate) fn sizes(&self) -> impl Iterator<Item = usize> {
        self.own.iter().map(Buffer::len)
    }

    /// The addresses of all, `[buffers, R]`, on the GPU.
    pub(crate) fn table(&self) -> View<'_, u64> {
        self.table.view()
    }

    /// Frees it, once all ranks have come here, with nothing more to write.
    ///
    /// # Errors
    /// A rank that does not come.
    pub(crate) fn close(self, peers: &Peers, at: At<'_>) -> Result<()> {
        let Self { own, all, table: _ } = self;
        // what others have opened goes after they have closed it
        drop(all);
        peers.most(at, [0])?;
        drop(own);
        Ok(())
    }
}

fn error(error: moe_cuda::Error) -> Error {
    Error::Device(error.to_string())
}
