//! Working memory: one allocation that keeps its size from use to use, cut into slices.
//!
//! ```
//! # use moe_kernels::arena::{Arena, room};
//! let mut arena = Arena::default();
//! arena.reserve(room::<f32>(100) + room::<u8>(7));
//! let mut cut = arena.cut();
//! let (sums, codes) = (cut.floats(100), cut.bytes(7));
//! # assert_eq!((sums.len(), codes.len()), (100, 7));
//! ```

/// A cache line: what slices are aligned to.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "read as bytes")] [u8; LINE]);

const LINE: usize = 64;

/// Bytes of an arena that a slice of `len` elements takes.
pub const fn room<T>(len: usize) -> usize {
    (len * size_of::<T>()).next_multiple_of(LINE)
}

/// Memory to be cut into slices.
#[derive(Default)]
pub struct Arena(Vec<Line>);

impl Arena {
    /// Makes sure of `bytes` bytes: the sum of the slices' [`room`]s.
    pub fn reserve(&mut self, bytes: usize) {
        let lines = bytes.div_ceil(LINE);
        if lines > self.0.len() {
            // The old memory goes first, and nothing of it is kept.
            self.0 = Vec::new();
            self.0 = vec![Line([0; LINE]); lines];
        }
    }

    /// Bytes that are held.
    pub fn bytes(&self) -> usize {
        self.0.len() * LINE
    }

    /// To be cut from the beginning.
    pub fn cut(&mut self) -> Cut<'_> {
        Cut(&mut self.0)
    }
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.bytes())
    }
}

/// What is left of an [`Arena`]. Slices start on a cache line of their own, and hold anything.
#[derive(Default)]
pub struct Cut<'a>(&'a mut [Line]);

impl<'a> Cut<'a> {
    /// The next `len` bytes.
    ///
    /// # Panics
    /// If too little was reserved.
    pub fn bytes(&mut self, len: usize) -> &'a mut [u8] {
        &mut self.lines(len).as_flattened_mut()[..len]
    }

    /// The next `len` floats.
    ///
    /// # Panics
    /// If too little was reserved.
    pub fn floats(&mut self, len: usize) -> &'a mut [f32] {
        let lines = self.lines(len * size_of::<f32>());
        // SAFETY: the lines hold at least `len` floats, are aligned for them and borrowed mutably
        // for 'a; every pattern of bits is a float.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), len) }
    }

    fn lines(&mut self, bytes: usize) -> &'a mut [[u8; LINE]] {
        let (taken, rest) = std::mem::take(&mut self.0).split_at_mut(bytes.div_ceil(LINE));
        self.0 = rest;
        let (at, len) = (taken.as_mut_ptr().cast(), taken.len());
        // SAFETY: a line is its array, aligned more strictly; the borrow is the same.
        unsafe { std::slice::from_raw_parts_mut(at, len) }
    }
}

impl std::fmt::Debug for Cut<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.0.len() * LINE)
    }
}

/// The bytes of floats.
pub fn bytes(floats: &[f32]) -> &[u8] {
    // SAFETY: any float is four initialised bytes; the borrow is the same.
    unsafe { std::slice::from_raw_parts(floats.as_ptr().cast(), size_of_val(floats)) }
}

/// The bytes of floats, to be written.
pub fn bytes_mut(floats: &mut [f32]) -> &mut [u8] {
    // SAFETY: as above; and any four bytes are a float.
    unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), size_of_val(floats)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_aligned_apart_and_within_what_was_reserved() {
        let mut arena = Arena::default();
        assert!(arena.cut().floats(0).is_empty());
        let lens = [0, 1, 16, 17];
        let bytes = lens.iter().map(|len| room::<f32>(*len) + room::<u8>(*len)).sum();
        arena.reserve(bytes);
        assert_eq!(arena.bytes(), bytes);
        let mut cut = arena.cut();
        for (i, len) in lens.into_iter().enumerate() {
            let (floats, bytes) = (cut.floats(len), cut.bytes(len));
            floats.fill(i as f32);
            bytes.fill(i as u8);
            assert!(floats.as_ptr().addr().is_multiple_of(64));
            assert!(bytes.as_ptr().addr().is_multiple_of(64));
            assert!(floats.iter().all(|v| *v == i as f32));
        }
        arena.reserve(10);
        assert_eq!(arena.bytes(), bytes, "an arena does not shrink");
    }

    #[test]
    #[should_panic(expected = "mid > len")]
    fn more_than_was_reserved_is_refused() {
        let mut arena = Arena::default();
        arena.reserve(64);
        arena.cut().floats(17);
    }
}
