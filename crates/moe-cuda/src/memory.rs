//! Memory of the GPU and pinned memory of the host.
//!
//! A [`Buffer`] owns device memory; [`View`] and [`ViewMut`] are parts of one, or of memory that an
//! engine brings. They are what the verbs take: a pointer with a length and a type.

use std::marker::PhantomData;
use std::ops::Range;
use std::{fmt, ptr, slice};

use crate::driver::call;
use crate::{Error, Gpu, Result, Stream};

/// Plain numbers that are the same bytes on host and device.
///
/// # Safety
/// No padding, and every pattern of bits is a value.
pub unsafe trait Pod: Copy + Send + Sync + 'static {}

macro_rules! pod {
    ($($type:ty)*) => { $(
        // SAFETY: an integer or a float.
        unsafe impl Pod for $type {}
    )* };
}
pod! { u8 i8 u16 i16 u32 i32 u64 i64 f32 f64 }

/// Device memory: `len` elements, freed when dropped. Freeing waits until the GPU is idle, so no
/// kernel loses memory under its feet.
pub struct Buffer<T> {
    gpu: Gpu,
    pointer: u64,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    /// Memory for `len` elements, holding anything. `purpose` is for the message when there is not
    /// enough.
    ///
    /// # Errors
    /// If the GPU has not that much free.
    pub fn new(gpu: &Gpu, len: usize, purpose: &str) -> Result<Self> {
        let driver = gpu.bind()?;
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| {
            Error::input("device memory", format!("{len} elements for {purpose} are too many"))
        })?;
        let mut pointer = 0;
        if bytes > 0 {
            // SAFETY: the pointer is good for one device pointer.
            let code = unsafe { (driver.cuMemAlloc_v2)(&mut pointer, bytes) };
            const OUT_OF_MEMORY: i32 = 2;
            if code == OUT_OF_MEMORY {
                let (free, total) = gpu.memory()?;
                let (wanted, purpose) = (bytes as u64, purpose.to_owned());
                return Err(Error::OutOfMemory { wanted, purpose, free, total });
            }
            driver.check("cuMemAlloc_v2", code)?;
        }
        Ok(Self { gpu: gpu.clone(), pointer, len, of: PhantomData })
    }

    /// Memory that holds `values`; they are there when this returns.
    ///
    /// # Errors
    /// As [`Self::new`]; or if an earlier step on the stream failed.
    pub fn from_slice(stream: &Stream, values: &[T], purpose: &str) -> Result<Self> {
        let mut buffer = Self::new(stream.gpu(), values.len(), purpose)?;
        stream.copy_in(values, buffer.view_mut())?;
        Ok(buffer)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whose memory it is.
    pub(crate) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// All of it, to read.
    pub fn view(&self) -> View<'_, T> {
        View { pointer: self.pointer, len: self.len, of: PhantomData }
    }

    /// All of it, to write.
    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut { pointer: self.pointer, len: self.len, of: PhantomData }
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.pointer != 0
            && let Ok(driver) = self.gpu.bind()
        {
            // SAFETY: allocated once, freed once. An error here is one that a later call reports.
            let _ = unsafe { (driver.cuMemFree_v2)(self.pointer) };
        }
    }
}

impl<T> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} elements on {:?}", self.len, self.gpu)
    }
}

/// Device memory to read: a pointer and a number of elements.
#[derive(Debug)]
pub struct View<'a, T> {
    pub(crate) pointer: u64,
    pub(crate) len: usize,
    of: PhantomData<&'a T>,
}

impl<T> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for View<'_, T> {}

impl<'a, T: Pod> View<'a, T> {
    /// Memory that someone else owns.
    ///
    /// # Safety
    /// `pointer` is aligned for `T` and good for reading `len` elements on the GPU it is used on,
    /// for as long as work that was given it may run.
    pub unsafe fn from_raw(pointer: u64, len: usize) -> Self {
        Self { pointer, len, of: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device pointer.
    pub fn address(&self) -> u64 {
        self.pointer
    }

    /// A part of it.
    ///
    /// # Panics
    /// If the range ends outside.
    pub fn part(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        let pointer = self.pointer + (range.start * size_of::<T>()) as u64;
        Self { pointer, len: range.len(), of: PhantomData }
    }
}

/// Device memory to write: a pointer and a number of elements.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    pub(crate) pointer: u64,
    pub(crate) len: usize,
    of: PhantomData<&'a mut T>,
}

impl<'a, T: Pod> ViewMut<'a, T> {
    /// Memory that someone else owns.
    ///
    /// # Safety
    /// As [`View::from_raw`], for writing; nothing else uses it meanwhile.
    pub unsafe fn from_raw(pointer: u64, len: usize) -> Self {
        Self { pointer, len, of: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The same, for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_, T> {
        ViewMut { pointer: self.pointer, len: self.len, of: PhantomData }
    }

    /// The same, to read.
    pub fn as_view(&self) -> View<'_, T> {
        View { pointer: self.pointer, len: self.len, of: PhantomData }
    }

    /// The device pointer.
    pub fn address(&self) -> u64 {
        self.pointer
    }

    /// A part of it.
    ///
    /// # Panics
    /// If the range ends outside.
    pub fn part(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        let pointer = self.pointer + (range.start * size_of::<T>()) as u64;
        Self { pointer, len: range.len(), of: PhantomData }
    }
}

/// Host memory that the GPU copies from and to directly; zeros at first.
pub struct Pinned<T> {
    gpu: Gpu,
    pointer: *mut T,
    len: usize,
}

// SAFETY: it owns its memory, as a `Box<[T]>` would.
unsafe impl<T: Pod> Send for Pinned<T> {}
// SAFETY: as above.
unsafe impl<T: Pod> Sync for Pinned<T> {}

impl<T: Pod> Pinned<T> {
    /// Memory for `len` elements.
    ///
    /// # Errors
    /// If the host cannot give that much.
    pub fn new(gpu: &Gpu, len: usize) -> Result<Self> {
        let driver = gpu.bind()?;
        let bytes = len
            .checked_mul(size_of::<T>())
            .ok_or_else(|| Error::input("pinned memory", format!("{len} elements are too many")))?;
        let mut pointer = ptr::null_mut();
        // SAFETY: the pointer is good for one pointer; zero bytes are not asked for.
        call!(driver.cuMemAllocHost_v2(&mut pointer, bytes.max(1)))?;
        let pointer = pointer.cast::<T>();
        // SAFETY: as many elements were allocated; the pages are aligned for any number.
        unsafe { ptr::write_bytes(pointer, 0, len) };
        Ok(Self { gpu: gpu.clone(), pointer, len })
    }

    /// Its elements.
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: allocated for `len` elements, written when made, and borrowed with `self`.
        unsafe { slice::from_raw_parts(self.pointer, self.len) }
    }

    /// Its elements, to write.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { slice::from_raw_parts_mut(self.pointer, self.len) }
    }
}

impl<T> fmt::Debug for Pinned<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pinned elements", self.len)
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        if let Ok(driver) = self.gpu.bind() {
            // SAFETY: allocated once, freed once; copies to and from it are waited for.
            let _ = unsafe { (driver.cuMemFreeHost)(self.pointer.cast()) };
        }
    }
}
