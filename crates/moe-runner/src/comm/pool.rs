//! Buffers that have travelled are used again, to send from and to receive into, so that exchanges
//! of the same sizes allocate nothing, and touch no fresh pages, after the first few.

use std::sync::{Arc, Mutex, PoisonError};

use super::{Dtype, Elements};

/// Smaller buffers are left to the allocator.
const WORTHWHILE: usize = 64 << 10;
/// Buffers kept; of more, the oldest are freed.
const KEPT: usize = 8;

/// The buffers that one rank has sent and received in one group, lately.
#[derive(Default)]
pub struct Pool {
    kept: Mutex<Vec<Arc<Elements>>>,
}

impl Pool {
    /// Keeps a buffer that somebody may still be reading.
    pub(super) fn keep(&self, buffer: Arc<Elements>) {
        if buffer.len() * buffer.dtype().size() < WORTHWHILE {
            return;
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.remove(0);
        }
        kept.push(buffer);
    }

    /// A buffer of `len` elements, which hold anything: one that nobody reads any more, or a new one.
    pub(super) fn take(&self, dtype: Dtype, len: usize) -> Elements {
        let mut buffer = match len * dtype.size() < WORTHWHILE {
            true => Elements::new(dtype),
            false => self.take_free(dtype).unwrap_or_else(|| Elements::new(dtype)),
        };
        buffer.resize(len);
        buffer
    }

    fn take_free(&self, dtype: Dtype) -> Option<Elements> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let free = |kept: &mut Arc<Elements>| kept.dtype() == dtype && Arc::get_mut(kept).is_some();
        let index = kept.iter_mut().position(free)?;
        Arc::try_unwrap(kept.remove(index)).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A barrier between two exchanges must not cost them their buffers.
    #[test]
    fn large_buffers_come_back_and_small_ones_do_not_use_them_up() {
        let pool = Pool::default();
        let buffer = Arc::new(pool.take(Dtype::Bytes, WORTHWHILE));
        let place = buffer.as_ptr();
        pool.keep(buffer.clone());
        assert_ne!(pool.take(Dtype::Bytes, WORTHWHILE).as_ptr(), place, "somebody reads it");
        drop(buffer);
        assert_ne!(pool.take(Dtype::Bytes, 0).as_ptr(), place, "too small to need it");
        assert_ne!(pool.take(Dtype::F32, WORTHWHILE).as_ptr(), place, "another dtype");
        assert_eq!(pool.take(Dtype::Bytes, WORTHWHILE).as_ptr(), place);
    }
}
