//! What travels: elements of one dtype, with a part for every rank; and what has come.

use std::collections::TryReserveError;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

use half::{bf16, f16};
use moe_kernels::pool::ThreadPool;
use moe_kernels::region::for_each;

use super::Buffers;

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

        $(impl sealed::Sealed for $type {}
        impl Element for $type {
            const DTYPE: Dtype = Dtype::$variant;
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

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

mod sealed {
    pub trait Sealed {}
}

/// An element that ranks exchange: f32, bf16, f16, u8, u32, u64.
pub trait Element: sealed::Sealed + bytemuck::Pod + Send + Sync {
    /// Its dtype.
    const DTYPE: Dtype;
}

/// An element that ranks can add up.
pub trait Sum: Element {
    /// What sums are kept in until they are rounded, once.
    type Wide: Copy + Default;

    /// Exact.
    fn widen(self) -> Self::Wide;

    /// `a + b`.
    fn add(a: Self::Wide, b: Self::Wide) -> Self::Wide;

    /// Rounded to this dtype, ties to even.
    fn narrow(wide: Self::Wide) -> Self;
}

macro_rules! sums {
    ($($type:ty as $wide:ty: $widen:expr, $add:expr, $narrow:expr;)*) => {$(
        impl Sum for $type {
            type Wide = $wide;
            fn widen(self) -> $wide {
                $widen(self)
            }
            fn add(a: $wide, b: $wide) -> $wide {
                $add(a, b)
            }
            fn narrow(wide: $wide) -> Self {
                $narrow(wide)
            }
        }
    )*};
}

sums! {
    f32 as f32: |x| x, |a, b| a + b, |x| x;
    bf16 as f32: bf16::to_f32, |a, b| a + b, bf16::from_f32;
    f16 as f32: f16::to_f32, |a, b| a + b, f16::from_f32;
    u64 as u64: |x| x, u64::wrapping_add, |x| x;
}

/// Elements of one dtype, and which of them go to which rank. The memory outlives what it holds: a
/// message that nobody reads any more carries the next elements.
pub struct Message {
    dtype: Dtype,
    len: usize,
    /// The elements, from the first word on; there may be more words than they need.
    words: Vec<u64>,
    /// Where each rank's part ends; empty where every rank gets all elements.
    ends: Vec<usize>,
}

impl Message {
    pub(super) fn new() -> Self {
        Self { dtype: Dtype::Bytes, len: 0, words: Vec::new(), ends: Vec::new() }
    }

    /// The elements' dtype.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True without elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that it can carry without more memory.
    pub(super) fn room(&self) -> usize {
        self.words.len() * size_of::<u64>()
    }

    /// Makes room for `len` elements, which hold anything, for every rank.
    pub(super) fn reset(&mut self, dtype: Dtype, len: usize) -> Result<(), TryReserveError> {
        let words = len.saturating_mul(dtype.size()).div_ceil(size_of::<u64>());
        if words > self.words.len() {
            self.words.try_reserve_exact(words - self.words.len())?;
            self.words.resize(words, 0);
        }
        (self.dtype, self.len) = (dtype, len);
        self.ends.clear();
        Ok(())
    }

    /// From now on rank r of `ranks` gets `count(r)` elements. The caller has checked that they are
    /// all.
    pub(super) fn cut(&mut self, ranks: usize, count: impl Fn(usize) -> usize) {
        self.ends.clear();
        self.ends.extend((0..ranks).scan(0, |end, rank| {
            *end += count(rank);
            Some(*end)
        }));
    }

    /// The elements, if they are of this dtype.
    pub fn elements<T: Element>(&self) -> Option<&[T]> {
        (self.dtype == T::DTYPE).then(|| &bytemuck::cast_slice(&self.words)[..self.len])
    }

    /// The elements, if they are of this dtype, to be written.
    pub(super) fn elements_mut<T: Element>(&mut self) -> Option<&mut [T]> {
        let Self { dtype, len, words, .. } = self;
        (*dtype == T::DTYPE).then(|| &mut bytemuck::cast_slice_mut(words)[..*len])
    }

    /// The elements' bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len * self.dtype.size()]
    }

    /// The elements' bytes, to be written.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.len * self.dtype.size()]
    }

    /// The bytes of the elements for `rank`.
    pub(super) fn part(&self, rank: usize) -> &[u8] {
        let (span, width) = (self.span(rank), self.dtype.size());
        &self.bytes()[span.start * width..span.end * width]
    }

    /// The elements for `rank`.
    pub(super) fn span(&self, rank: usize) -> Range<usize> {
        match self.ends.get(rank) {
            None => 0..self.len,
            Some(end) => rank.checked_sub(1).map_or(0, |before| self.ends[before])..*end,
        }
    }
}

/// Some elements of a message that ranks share.
pub type Part = (Arc<Message>, Range<usize>);

/// Elements to be sent, this rank's alone until then: from
/// `buffer` of the group. They hold anything at first.
pub struct Outgoing<T> {
    pub(super) message: Arc<Message>,
    dtype: PhantomData<T>,
}

impl<T: Element> Outgoing<T> {
    /// `message` is of this dtype, and nobody else has it.
    pub(super) fn new(message: Arc<Message>) -> Self {
        debug_assert_eq!(message.dtype, T::DTYPE);
        Self { message, dtype: PhantomData }
    }

    /// The message, which nobody else has.
    pub(super) fn message_mut(&mut self) -> &mut Message {
        Arc::get_mut(&mut self.message).expect("a message is shared when it is sent")
    }
}

impl<T: Element> Deref for Outgoing<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.message.elements().unwrap_or_default()
    }
}

impl<T: Element> DerefMut for Outgoing<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.message_mut().elements_mut().unwrap_or_default()
    }
}

/// What came from every rank, where it lies: with threads in the senders' own buffers. Their ranks
/// can use those buffers again once this is dropped.
pub struct Received<T> {
    parts: Vec<Part>,
    buffers: Arc<Buffers>,
    dtype: PhantomData<T>,
}

impl<T: Element> Received<T> {
    /// `None` unless all parts are of this dtype, and lie in their messages.
    pub(super) fn new(parts: Vec<Part>, buffers: Arc<Buffers>) -> Option<Self> {
        let fits = |(message, span): &Part| {
            message.elements::<T>().is_some_and(|elements| elements.get(span.clone()).is_some())
        };
        parts.iter().all(fits).then_some(Self { parts, buffers, dtype: PhantomData })
    }

    /// Number of parts: the group's size.
    pub fn ranks(&self) -> usize {
        self.parts.len()
    }

    /// The part from `rank`.
    pub fn part(&self, rank: usize) -> &[T] {
        let (message, span) = &self.parts[rank];
        // both checked when made
        message.elements().and_then(|elements| elements.get(span.clone())).unwrap_or_default()
    }

    /// The parts in rank order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[T]> + Clone {
        (0..self.parts.len()).map(|rank| self.part(rank))
    }

    /// The parts, one after the other.
    pub fn to_vec(&self) -> Vec<T> {
        let mut all = Vec::with_capacity(self.iter().map(<[T]>::len).sum());
        self.iter().for_each(|part| all.extend_from_slice(part));
        all
    }

    /// Writes the sum of the parts, added in rank order, to `out`, on the threads of `pool`. The
    /// caller has checked that all parts are as long.
    pub(super) fn sum_into(&self, out: &mut [T], pool: &dyn ThreadPool)
    where
        T: Sum,
    {
        // in blocks: the wide sums stay in the first-level cache
        const BLOCK: usize = 1024;
        /// Blocks that are worth the handing out.
        const BLOCKS: usize = 8;
        for_each(pool, out.chunks_mut(BLOCK * BLOCKS).enumerate(), |(item, out)| {
            let mut wide = [T::Wide::default(); BLOCK];
            for (block, out) in out.chunks_mut(BLOCK).enumerate() {
                let start = (item * BLOCKS + block) * BLOCK;
                let wide = &mut wide[..out.len()];
                for (rank, part) in self.iter().enumerate() {
                    for (sum, x) in wide.iter_mut().zip(&part[start..][..out.len()]) {
                        *sum = if rank == 0 { x.widen() } else { T::add(*sum, x.widen()) };
                    }
                }
                out.iter_mut().zip(wide).for_each(|(out, sum)| *out = T::narrow(*sum));
            }
        });
    }
}

impl<T> Drop for Received<T> {
    fn drop(&mut self) {
        self.buffers.keep_list(std::mem::take(&mut self.parts));
    }
}

impl<T: Element + fmt::Debug> fmt::Debug for Received<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_kernels::pool::{Inline, Pool};

    fn received<T: Element>(parts: &[Vec<T>]) -> Received<T> {
        let buffers = Arc::new(Buffers::default());
        let parts = parts.iter().map(|part| {
            let mut message = Message::new();
            message.reset(T::DTYPE, part.len()).unwrap();
            message.elements_mut().unwrap().copy_from_slice(part);
            (Arc::new(message), 0..part.len())
        });
        Received::new(parts.collect(), buffers).unwrap()
    }

    fn sum<T: Sum>(parts: &[Vec<T>]) -> Vec<T> {
        let pool = Pool::new(3).unwrap();
        let (mut one, mut many) = (vec![T::zeroed(); parts[0].len()], vec![]);
        many.clone_from(&one);
        received(parts).sum_into(&mut one, &Inline);
        received(parts).sum_into(&mut many, &pool);
        assert_eq!(bytemuck::cast_slice::<T, u8>(&one), bytemuck::cast_slice::<T, u8>(&many));
        one
    }

    #[test]
    fn parts_lie_one_after_the_other() {
        let mut message = Message::new();
        message.reset(Dtype::U32, 5).unwrap();
        assert_eq!((message.span(0), message.span(7)), (0..5, 0..5));
        message.cut(4, |rank| [0, 2, 0, 3][rank]);
        assert_eq!([0, 1, 2, 3].map(|rank| message.span(rank)), [0..0, 0..2, 2..2, 2..5]);
        assert_eq!(message.bytes().len(), 20);
        assert!(message.elements::<f32>().is_none());
        assert!(message.reset(Dtype::U64, usize::MAX / 2).is_err(), "more than there is");
        message.reset(Dtype::Bytes, 3).unwrap();
        assert_eq!((message.span(1), message.room()), (0..3, 24));
    }

    #[test]
    fn bf16_sums_are_rounded_once() {
        // 256 + 1 + 1: bf16 has 8 significant bits, so 257 rounds to 256, but 258 is exact.
        let parts = [256.0, 1.0, 1.0].map(|x| vec![bf16::from_f32(x)]);
        assert_eq!(sum(&parts), [bf16::from_f32(258.0)]);
    }

    #[test]
    fn sums_are_in_rank_order_across_blocks() {
        let len = 25_000;
        let term = |rank: usize, i: usize| [1e8f32, 1.0, -1e8][rank] * (i % 7) as f32;
        let parts = [0, 1, 2].map(|rank| (0..len).map(|i| term(rank, i)).collect::<Vec<_>>());
        let want: Vec<f32> = (0..len).map(|i| term(0, i) + term(1, i) + term(2, i)).collect();
        assert_eq!(sum(&parts), want);
        assert!(sum::<f32>(&[vec![], vec![], vec![]]).is_empty());
    }
}
