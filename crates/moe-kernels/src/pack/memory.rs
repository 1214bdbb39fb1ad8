//! Memory for packed weights.
//!
//! Kernels read a matrix from one end to the other, and each page on the way costs a walk through
//! the page table: with pages of 4 KiB, a third of the time at one token. A matrix is smaller than
//! a huge page, so matrices share large mappings, for which the system is asked for huge pages. A
//! mapping lives as long as a matrix in it; what nobody has written takes no memory. Built without
//! `mmap`, the allocator's memory takes their place.

use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Bytes of a cache line: where memory begins.
pub(crate) const LINE: usize = 64;

/// Bytes of a huge page, on the processors that have them.
const HUGE: usize = 2 << 20;

/// Bytes of a mapping that matrices share.
const SHARED: usize = 32 * HUGE;

#[cfg(feature = "mmap")]
type Owner = memmap2::MmapMut;
#[cfg(not(feature = "mmap"))]
type Owner = Box<[u8]>;

/// That many zeros.
#[cfg(feature = "mmap")]
fn anonymous(len: usize) -> io::Result<Owner> {
    let map = Owner::map_anon(len)?;
    // A refusal changes nothing but time.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok(map)
}

#[cfg(not(feature = "mmap"))]
fn anonymous(len: usize) -> io::Result<Owner> {
    // An allocation that fails ends the program: first one that may.
    Vec::<u8>::new().try_reserve_exact(len)?;
    Ok(vec![0; len].into())
}

/// A mapping that is handed out from the front.
struct Mapping {
    /// Keeps the memory.
    _owner: Owner,
    first: NonNull<u8>,
    len: usize,
    taken: Mutex<usize>,
}

// SAFETY: a mapping is memory, and its parts are handed out once each.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(len: usize) -> io::Result<Arc<Mapping>> {
        // Room to begin at a huge page.
        let room = len.checked_add(HUGE).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut owner = anonymous(room)?;
        let skip = owner.as_ptr().align_offset(HUGE);
        let first = NonNull::from(&mut owner[skip..]).cast();
        Ok(Arc::new(Mapping { _owner: owner, first, len, taken: Mutex::new(0) }))
    }

    /// The next `len` bytes; `None` if they are not there.
    fn take(self: &Arc<Mapping>, len: usize) -> Option<Memory> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let end = taken.checked_add(len.next_multiple_of(LINE))?;
        if end > self.len {
            return None;
        }
        // SAFETY: inside the mapping.
        let at = unsafe { self.first.add(*taken) };
        *taken = end;
        Some(Memory { at, len, _mapping: self.clone() })
    }
}

/// Zeroed bytes that begin at a cache line.
pub(crate) struct Memory {
    at: NonNull<u8>,
    len: usize,
    _mapping: Arc<Mapping>,
}

// SAFETY: a `Memory` owns its bytes, as a `Box` does.
unsafe impl Send for Memory {}
// SAFETY: as above; a shared one only lends them for reading.
unsafe impl Sync for Memory {}

impl Memory {
    /// `len` bytes.
    ///
    /// # Errors
    /// If the system has no memory for them.
    pub(crate) fn zeroed(len: usize) -> io::Result<Memory> {
        static CURRENT: Mutex<Weak<Mapping>> = Mutex::new(Weak::new());
        let whole = |mapping: Arc<Mapping>| mapping.take(len).ok_or(io::ErrorKind::OutOfMemory);
        if len > SHARED / 4 {
            let rounded = len.checked_next_multiple_of(HUGE).ok_or(io::ErrorKind::OutOfMemory)?;
            return Ok(whole(Mapping::new(rounded)?)?);
        }
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(memory) = current.upgrade().and_then(|mapping| mapping.take(len)) {
            return Ok(memory);
        }
        let mapping = Mapping::new(SHARED)?;
        *current = Arc::downgrade(&mapping);
        Ok(whole(mapping)?)
    }
}

impl std::ops::Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: mapped memory is initialised, and this part is ours.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for Memory {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl std::ops::DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_zeroed_aligned_and_apart() {
        let mut parts: Vec<Memory> =
            [1, 64, 100, 0, SHARED, HUGE + 1].map(|len| Memory::zeroed(len).unwrap()).into();
        for (i, part) in parts.iter_mut().enumerate() {
            assert!(part.as_ptr().align_offset(LINE) == 0 && part.iter().all(|byte| *byte == 0));
            part.fill(i as u8 + 1);
        }
        for (i, part) in parts.iter().enumerate() {
            assert!(part.iter().all(|byte| *byte == i as u8 + 1), "{i}");
        }
        assert!(Memory::zeroed(usize::MAX).is_err());
    }
}
