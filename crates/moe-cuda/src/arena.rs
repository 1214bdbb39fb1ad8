//! Working memory on the device: one allocation that keeps its size from pass to pass, cut into
//! parts.

use std::marker::PhantomData;

use crate::memory::Pod;
use crate::{Buffer, Gpu, Result, ViewMut};

/// What parts are aligned to: more than any kernel asks for.
const LINE: usize = 256;

/// Bytes of an arena that a part of `len` elements takes.
pub const fn room<T>(len: usize) -> usize {
    (len * size_of::<T>()).next_multiple_of(LINE)
}

/// Device memory to be cut into parts. Passes on one stream may share it: each begins when the one
/// before is done with it.
#[derive(Debug)]
pub struct Arena {
    memory: Buffer<u8>,
}

impl Arena {
    /// An empty one.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn new(gpu: &Gpu) -> Result<Self> {
        Ok(Self { memory: Buffer::new(gpu, 0, "nothing")? })
    }

    /// Makes sure of `bytes` bytes: the sum of the parts' [`room`]s. Nothing of what was in it is kept
    /// if it must grow, and then this waits for the GPU; graphs that were captured with the old
    /// memory must not run again.
    ///
    /// # Errors
    /// If the GPU has not enough memory.
    pub fn reserve(&mut self, gpu: &Gpu, bytes: usize) -> Result<()> {
        if bytes > self.memory.len() {
            // the old memory goes first
            self.memory = Buffer::new(gpu, 0, "nothing")?;
            self.memory = Buffer::new(gpu, bytes, "the working memory of passes")?;
        }
        Ok(())
    }

    /// Bytes that are held.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// To be cut from the beginning.
    pub fn cut(&mut self) -> Cut<'_> {
        let left = self.memory.len();
        Cut { pointer: self.memory.view_mut().pointer, left, of: PhantomData }
    }
}

/// What is left of an [`Arena`].
#[derive(Debug)]
pub struct Cut<'a> {
    pointer: u64,
    left: usize,
    of: PhantomData<&'a mut ()>,
}

impl<'a> Cut<'a> {
    /// Bytes of the parts that `cut` takes. What it gets is to be counted, not to be used: there is no
    /// memory behind it.
    pub fn measure(cut: impl FnOnce(&mut Cut<'_>)) -> usize {
        let mut nothing = Cut { pointer: 0, left: usize::MAX / 2, of: PhantomData };
        cut(&mut nothing);
        nothing.pointer as usize
    }

    /// The next `len` elements, holding anything.
    ///
    /// # Panics
    /// If too little was reserved.
    pub fn take<T: Pod>(&mut self, len: usize) -> ViewMut<'a, T> {
        let bytes = room::<T>(len);
        assert!(bytes <= self.left, "{bytes} bytes of an arena with {} left", self.left);
        let pointer = self.pointer;
        (self.pointer, self.left) = (pointer + bytes as u64, self.left - bytes);
        // SAFETY: the arena is borrowed for 'a, the part lies inside it and is cut only once; it is
        // aligned, since allocations are aligned to at least a line and parts are whole lines.
        unsafe { ViewMut::from_raw(pointer, len) }
    }
}
