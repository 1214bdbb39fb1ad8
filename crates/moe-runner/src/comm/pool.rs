//! Buffers that were sent come back to be received into, so that exchanges of the same sizes
//! allocate nothing, and touch no fresh pages, after the first few.

use std::sync::{Arc, Mutex, PoisonError};

use super::{Dtype, Elements};

/// Smaller buffers are left to the allocator.
const WORTHWHILE: usize = 64 << 10;
/// Buffers kept; of more, the oldest are freed.
const KEPT: usize = 4;

/// The buffers that one rank has sent in one group, lately.
#[derive(Default)]
pub(super) struct Pool {
    sent: Mutex<Vec<Arc<Elements>>>,
}

impl Pool {
    /// Keeps a buffer that others may still be reading.
    pub(super) fn keep(&self, sent: Arc<Elements>) {
        if sent.len() * sent.dtype().size() < WORTHWHILE {
            return;
        }
        let mut kept = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.remove(0);
        }
        kept.push(sent);
    }

    /// A buffer of this dtype that nobody reads any more, with its old elements; or an empty one.
    pub(super) fn take(&self, dtype: Dtype) -> Elements {
        let mut kept = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        let free = |sent: &mut Arc<Elements>| sent.dtype() == dtype && Arc::get_mut(sent).is_some();
        let free = kept.iter_mut().position(free).map(|index| kept.remove(index));
        free.and_then(|sent| Arc::try_unwrap(sent).ok()).unwrap_or_else(|| Elements::new(dtype))
    }
}
