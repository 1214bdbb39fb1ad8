//! Messages that have travelled carry the next elements, so that exchanges of the same sizes
//! allocate nothing, and touch no fresh pages, after the first few.

use std::sync::Arc;

use super::message::{Message, Part};
use super::sync::{Mutex, lock};
use super::{Dtype, failure};
use crate::Result;

/// The messages that one rank has sent and received, and its lists of received parts. There are as
/// many of each as were under way at one time.
#[derive(Default)]
pub struct Buffers {
    messages: Mutex<Vec<Arc<Message>>>,
    lists: Mutex<Vec<Vec<Part>>>,
}

impl Buffers {
    /// Keeps a message that somebody may still be reading.
    pub(super) fn keep(&self, message: Arc<Message>) {
        lock(&self.messages).push(message);
    }

    /// A message of `len` elements, which hold anything, and that nobody else has: the smallest kept
    /// one with the room, or else the largest, or a new one.
    ///
    /// # Errors
    /// There is no memory for it.
    pub(super) fn take(&self, dtype: Dtype, len: usize) -> Result<Arc<Message>> {
        let mut message = self
            .take_free(len.saturating_mul(dtype.size()))
            .unwrap_or_else(|| Arc::new(Message::new()));
        let alone = Arc::get_mut(&mut message).expect("free messages have one owner");
        match alone.reset(dtype, len) {
            Ok(()) => Ok(message),
            Err(error) => {
                self.keep(message);
                Err(failure(0, &format!("a message of {len} elements ({dtype}): {error}")))
            }
        }
    }

    fn take_free(&self, bytes: usize) -> Option<Arc<Message>> {
        let mut messages = lock(&self.messages);
        let free = messages
            .iter_mut()
            .enumerate()
            .filter_map(|(at, message)| Arc::get_mut(message).map(|message| (at, message.room())));
        // too small ones come after all others, the largest first
        let fit = |&(_, room): &(usize, usize)| match room >= bytes {
            true => (0, room),
            false => (1, usize::MAX - room),
        };
        let (at, _) = free.min_by_key(fit)?;
        Some(messages.swap_remove(at))
    }

    /// An empty list.
    pub(super) fn take_list(&self) -> Vec<Part> {
        lock(&self.lists).pop().unwrap_or_default()
    }

    /// Lets go of the parts, and keeps the list.
    pub(super) fn keep_list(&self, mut list: Vec<Part>) {
        list.clear();
        if list.capacity() > 0 {
            lock(&self.lists).push(list);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn place(message: &Arc<Message>) -> *const u8 {
        message.bytes().as_ptr()
    }

    /// A small message must not take the large one's memory, nor one that somebody reads.
    #[test]
    fn messages_come_back_to_what_fits_them() {
        let buffers = Buffers::default();
        let [small, large] = [10, 1000].map(|len| buffers.take(Dtype::Bytes, len).unwrap());
        let (at_small, at_large) = (place(&small), place(&large));
        buffers.keep(small);
        buffers.keep(large.clone());
        let other = buffers.take(Dtype::F32, 200).unwrap();
        assert_ne!(place(&other), at_large, "somebody reads it");
        assert_eq!(other.dtype(), Dtype::F32);
        drop(large);
        // the small one has grown for it
        buffers.keep(other);
        assert_ne!(at_small, at_large);
        let messages = [4, 900].map(|len| buffers.take(Dtype::Bytes, len).unwrap());
        assert_eq!(place(&messages[1]), at_large);
        assert_eq!(lock(&buffers.messages).len(), 0);
        assert!(buffers.take(Dtype::F32, usize::MAX / 4).is_err());
    }
}
