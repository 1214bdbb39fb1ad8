//! Memory for packed weights.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// Bytes of a cache line: where memory begins.
pub(crate) const LINE: usize = 64;

/// Bytes of a huge page, on the processors that have them.
const HUGE: usize = 2 << 20;

/// Zeroed bytes that begin at a cache line. Where they fill huge pages, the system is asked for
/// them: kernels read from one end to the other, and each page costs a walk.
pub(crate) struct Memory {
    at: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a `Memory` owns its bytes, as a `Box` does.
unsafe impl Send for Memory {}
// SAFETY: as above; a shared one only lends them for reading.
unsafe impl Sync for Memory {}

impl Memory {
    /// `len` bytes; `None` if an address cannot hold so many.
    pub(crate) fn zeroed(len: usize) -> Option<Memory> {
        let align = if len >= HUGE { HUGE } else { LINE };
        let layout = Layout::from_size_align(len, align).ok()?;
        if len == 0 {
            return Some(Memory { at: NonNull::<[u64; LINE / 8]>::dangling().cast(), layout });
        }
        // SAFETY: the layout is not empty.
        let Some(at) = NonNull::new(unsafe { alloc_zeroed(layout) }) else {
            handle_alloc_error(layout)
        };
        let memory = Memory { at, layout };
        memory.advise();
        Some(memory)
    }

    /// Asks for huge pages. A refusal changes nothing but time.
    #[cfg(target_os = "linux")]
    fn advise(&self) {
        unsafe extern "C" {
            fn madvise(at: *mut std::ffi::c_void, len: usize, advice: i32) -> i32;
        }
        const MADV_HUGEPAGE: i32 = 14;
        let whole = self.layout.size() / HUGE * HUGE;
        if whole > 0 {
            // SAFETY: the bytes are ours, and the advice does not change what they hold.
            unsafe { madvise(self.at.as_ptr().cast(), whole, MADV_HUGEPAGE) };
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn advise(&self) {}
}

impl std::ops::Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: all bytes are initialised and ours.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.layout.size()) }
    }
}

impl std::ops::DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.layout.size() > 0 {
            // SAFETY: allocated with this layout, and not used any more.
            unsafe { dealloc(self.at.as_ptr(), self.layout) }
        }
    }
}
