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

    /// A buffer of this dtype that nobody reads any more, with its old elements; or an empty one.
    pub(super) fn take(&self, dtype: Dtype) -> Elements {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let free = |kept: &mut Arc<Elements>| kept.dtype() == dtype && Arc::get_mut(kept).is_some();
        let free = kept.iter_mut().position(free).map(|index| kept.remove(index));
        free.and_then(|free| Arc::try_unwrap(free).ok()).unwrap_or_else(|| Elements::new(dtype))
    }
}
