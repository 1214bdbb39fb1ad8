//! What travels: elements of a few dtypes, in one buffer with a part for, or from, every rank.

use std::fmt;
use std::marker::PhantomData;

use half::{bf16, f16};

use super::{Communicator, Part};
use crate::{Error, Result};

macro_rules! elements {
    ($($(#[$doc:meta])* $variant:ident($type:ty) = $text:literal,)*) => {
        /// A dtype that ranks exchange.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Dtype { $($(#[$doc])* $variant,)* }

        impl Dtype {
            /// Every dtype, in order of declaration.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The name in messages.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text),* }
            }

            /// Bytes of one element.
            pub fn size(self) -> usize {
                match self { $(Self::$variant => size_of::<$type>()),* }
            }
        }

        /// A buffer of elements of one dtype.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Elements { $($(#[$doc])* $variant(Vec<$type>),)* }

        impl Elements {
            /// An empty buffer.
            pub fn new(dtype: Dtype) -> Self {
                match dtype { $(Dtype::$variant => Self::$variant(Vec::new())),* }
            }

            /// The elements' dtype.
            pub fn dtype(&self) -> Dtype {
                match self { $(Self::$variant(_) => Dtype::$variant),* }
            }

            /// Number of elements.
            pub fn len(&self) -> usize {
                match self { $(Self::$variant(v) => v.len()),* }
            }

            /// Makes it `len` elements long; new ones are zero.
            pub(crate) fn resize(&mut self, len: usize) {
                match self { $(Self::$variant(v) => v.resize(len, Default::default())),* }
            }

            /// Where the elements are.
            pub(crate) fn as_ptr(&self) -> *const u8 {
                match self { $(Self::$variant(v) => v.as_ptr().cast()),* }
            }

            /// Where the elements are, to be overwritten.
            pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
                match self { $(Self::$variant(v) => v.as_mut_ptr().cast()),* }
            }

        }

        $(impl sealed::Sealed for $type {}
        impl Element for $type {
            const DTYPE: Dtype = Dtype::$variant;

            fn wrap(elements: Vec<Self>) -> Elements {
                Elements::$variant(elements)
            }

            fn unwrap(elements: Elements) -> Option<Vec<Self>> {
                match elements {
                    Elements::$variant(v) => Some(v),
                    _ => None,
                }
            }

            fn slice(elements: &Elements) -> Option<&[Self]> {
                match elements {
                    Elements::$variant(v) => Some(v),
                    _ => None,
                }
            }
        })*
    };
}

elements! {
    /// IEEE binary32.
    F32(f32) = "f32",
    /// bfloat16.
    Bf16(bf16) = "bf16",
    /// IEEE binary16.
    F16(f16) = "f16",
    /// Bytes: rows in their wire format.
    Bytes(u8) = "bytes",
    /// Ids.
    U32(u32) = "u32",
    /// Counts.
    U64(u64) = "u64",
}

impl Elements {
    /// True without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

mod sealed {
    pub trait Sealed {}
}

/// An element that ranks exchange: f32, bf16, f16, u8, u32, u64.
pub trait Element: sealed::Sealed + Copy + Default + Send + Sync + 'static {
    /// Its dtype.
    const DTYPE: Dtype;

    /// The elements as a buffer.
    fn wrap(elements: Vec<Self>) -> Elements;

    /// The elements of a buffer of this dtype.
    fn unwrap(elements: Elements) -> Option<Vec<Self>>;

    /// The elements of a buffer of this dtype, where they are.
    fn slice(elements: &Elements) -> Option<&[Self]>;
}

/// An element that ranks can add up.
pub trait Sum: Element {
    /// What sums are kept in until they are rounded, once.
    type Wide: Copy;

    /// Exact.
    fn widen(self) -> Self::Wide;

    /// `a + b`.
    fn add(a: Self::Wide, b: Self::Wide) -> Self::Wide;

    /// Rounded to this dtype, ties to even.
    fn narrow(wide: Self::Wide) -> Self;
}

impl Sum for f32 {
    type Wide = f32;
    fn widen(self) -> f32 {
        self
    }
    fn add(a: f32, b: f32) -> f32 {
        a + b
    }
    fn narrow(wide: f32) -> f32 {
        wide
    }
}

impl Sum for bf16 {
    type Wide = f32;
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn add(a: f32, b: f32) -> f32 {
        a + b
    }
    fn narrow(wide: f32) -> bf16 {
        bf16::from_f32(wide)
    }
}

impl Sum for f16 {
    type Wide = f32;
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn add(a: f32, b: f32) -> f32 {
        a + b
    }
    fn narrow(wide: f32) -> f16 {
        f16::from_f32(wide)
    }
}

impl Sum for u64 {
    type Wide = u64;
    fn widen(self) -> u64 {
        self
    }
    fn add(a: u64, b: u64) -> u64 {
        a.wrapping_add(b)
    }
    fn narrow(wide: u64) -> u64 {
        wide
    }
}

/// A buffer with one part for, or from, every rank: the parts in rank order, and their lengths.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parts<T> {
    data: Vec<T>,
    counts: Vec<usize>,
}

impl<T> Parts<T> {
    /// Parts of the given lengths. An error unless they fill `data`.
    pub fn new(data: Vec<T>, counts: Vec<usize>) -> Result<Self> {
        let total = counts.iter().try_fold(0usize, |sum, &count| sum.checked_add(count));
        if total != Some(data.len()) {
            return Err(Error::Communication(format!(
                "the parts {counts:?} do not fill the buffer of {} elements",
                data.len()
            )));
        }
        Ok(Self { data, counts })
    }

    /// Number of parts: the group's size.
    pub fn ranks(&self) -> usize {
        self.counts.len()
    }

    /// The parts' lengths, in rank order.
    pub fn counts(&self) -> &[usize] {
        &self.counts
    }

    /// All elements: the parts in rank order.
    pub fn data(&self) -> &[T] {
        &self.data
    }

    /// The part for, or from, `rank`.
    pub fn part(&self, rank: usize) -> &[T] {
        let start = self.counts[..rank].iter().sum();
        &self.data[start..][..self.counts[rank]]
    }

    /// The parts in rank order.
    pub fn iter(&self) -> impl Iterator<Item = &[T]> + Clone {
        let mut rest = &self.data[..];
        self.counts.iter().map(move |&count| {
            let (part, after) = rest.split_at(count);
            rest = after;
            part
        })
    }

    /// The buffer and the lengths, to be used again.
    pub fn into_inner(self) -> (Vec<T>, Vec<usize>) {
        (self.data, self.counts)
    }
}

/// What came from every rank, where it lies: with threads in the senders' own buffers. Their ranks
/// can use those buffers again once this is dropped.
#[derive(Debug)]
pub struct Received<T> {
    parts: Vec<Part>,
    dtype: PhantomData<T>,
}

impl<T: Element> Received<T> {
    /// `None` unless all parts are of this dtype, and lie in their buffers.
    pub(super) fn new(parts: Vec<Part>) -> Option<Self> {
        let fits = |(elements, span): &Part| {
            T::slice(elements).is_some_and(|elements| elements.get(span.clone()).is_some())
        };
        parts.iter().all(fits).then_some(Self { parts, dtype: PhantomData })
    }

    /// The part from `rank`.
    pub fn part(&self, rank: usize) -> &[T] {
        let (elements, span) = &self.parts[rank];
        // both checked when made
        T::slice(elements).and_then(|elements| elements.get(span.clone())).unwrap_or_default()
    }

    /// The parts in rank order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[T]> + Clone {
        (0..self.parts.len()).map(|rank| self.part(rank))
    }

    /// Copies the parts together, into a buffer of `comm`'s.
    pub(super) fn gather(&self, comm: &dyn Communicator) -> Parts<T> {
        let counts: Vec<usize> = self.iter().map(<[T]>::len).collect();
        let mut data = comm.buffer(counts.iter().sum());
        let mut rest = &mut data[..];
        for part in self.iter() {
            let (to, after) = rest.split_at_mut(part.len());
            to.copy_from_slice(part);
            rest = after;
        }
        Parts { data, counts }
    }
}

/// The sum of equally long parts, added in rank order. The caller has checked the lengths.
pub(crate) fn sum_parts<'a, T: Sum>(parts: impl Iterator<Item = &'a [T]> + Clone) -> Vec<T> {
    let len = parts.clone().next().map_or(0, <[T]>::len);
    debug_assert!(parts.clone().all(|part| part.len() == len));
    // In blocks: the wide sums stay in the first-level cache.
    const BLOCK: usize = 1024;
    let mut out = Vec::with_capacity(len);
    let mut wide: Vec<T::Wide> = Vec::with_capacity(BLOCK.min(len));
    for start in (0..len).step_by(BLOCK) {
        let block = start..(start + BLOCK).min(len);
        let mut parts = parts.clone().map(|part| &part[block.clone()]);
        wide.clear();
        wide.extend(parts.next().into_iter().flatten().map(|&x| x.widen()));
        for part in parts {
            for (sum, &x) in wide.iter_mut().zip(part) {
                *sum = T::add(*sum, x.widen());
            }
        }
        out.extend(wide.iter().map(|&sum| T::narrow(sum)));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_must_fill_the_buffer() {
        assert!(Parts::new(vec![1u8, 2, 3], vec![1, 1]).is_err());
        assert!(Parts::new(vec![1u8], vec![usize::MAX, 2]).is_err());
        let parts = Parts::new(vec![1u8, 2, 3], vec![0, 2, 0, 1]).unwrap();
        assert_eq!(parts.iter().collect::<Vec<_>>(), [&[][..], &[1, 2], &[], &[3]]);
        assert_eq!((parts.part(1), parts.part(3)), (&[1u8, 2][..], &[3u8][..]));
    }

    #[test]
    fn bf16_sums_are_rounded_once() {
        // 256 + 1 + 1: bf16 has 8 significant bits, so 257 rounds to 256, but 258 is exact.
        let parts = [256.0, 1.0, 1.0].map(bf16::from_f32).to_vec();
        let sum = sum_parts(Parts::new(parts, vec![1; 3]).unwrap().iter());
        assert_eq!(sum, [bf16::from_f32(258.0)]);
    }

    #[test]
    fn sums_are_in_rank_order_across_blocks() {
        let len = 2500;
        let term = |rank: usize, i: usize| [1e8f32, 1.0, -1e8][rank] * (i % 7) as f32;
        let data = (0..3).flat_map(|r| (0..len).map(move |i| term(r, i))).collect();
        let sum = sum_parts(Parts::new(data, vec![len; 3]).unwrap().iter());
        let want: Vec<f32> = (0..len).map(|i| term(0, i) + term(1, i) + term(2, i)).collect();
        assert_eq!(sum, want);
        assert!(sum_parts(Parts::<f32>::new(vec![], vec![0; 3]).unwrap().iter()).is_empty());
    }
}
