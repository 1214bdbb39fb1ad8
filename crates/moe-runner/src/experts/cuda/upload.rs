//! Weights on their way to the device: decoded on all threads into one of two pieces of pinned memory, while
//! the other is copied to where they stay. Beside the device's copy those pieces are all the memory that it
//! takes: 16 MiB.

use std::sync::atomic::{AtomicBool, Ordering};

use bytemuck::{cast_slice, cast_slice_mut};
use moe_cuda::weights::{Bytes, Element, ScaleType, Scales, Stored};
use moe_cuda::{Buffer, Event, Float, Norm, Pinned, RowQuantiser, Rows, ViewMut};
use moe_kernels::numerics::float16;
use moe_kernels::numerics::quantise::{GroupScale, Qdq};
use moe_kernels::pool::ThreadPool;
use moe_kernels::region::for_each_with;

use super::Sm90;
use super::device::{Device, error};
use crate::experts::Progress;
use crate::spec::{RmsNorm, WeightFormat};
use crate::weights::{
    ActivationQuant, Codes, Element as StoredElement, FloatType, Matrix, ScaleType as StoredScale,
    View, Zeros,
};
use crate::{Error, Result};

/// Floats of a piece of the pinned memory.
const STAGING: usize = 2 << 20;

/// See the module.
pub(super) struct Upload<'a> {
    device: &'a Device,
    pool: &'a dyn ThreadPool,
    staging: [Staging; 2],
    /// The piece that was longest ago.
    next: usize,
    scratch: Vec<Vec<f32>>,
    progress: &'a mut (dyn FnMut(Progress) + Send),
    done: usize,
    total: usize,
}

/// A piece of pinned memory, and when what it holds has been copied.
struct Staging {
    memory: Pinned<f32>,
    copied: Event,
    pending: bool,
}

impl Staging {
    fn new(device: &Device) -> Result<Self> {
        let memory = Pinned::new(&device.gpu, STAGING).map_err(error)?;
        let copied = Event::new(&device.gpu).map_err(error)?;
        Ok(Self { memory, copied, pending: false })
    }

    /// Waits until it is free.
    fn free(&mut self) -> Result<&mut [u8]> {
        if self.pending {
            self.copied.synchronize().map_err(error)?;
            self.pending = false;
        }
        Ok(cast_slice_mut(self.memory.as_mut_slice()))
    }

    /// Starts to copy its first bytes to all of `to`.
    fn send(&mut self, device: &Device, to: ViewMut<'_, u8>) -> Result<()> {
        let from = &cast_slice(self.memory.as_slice())[..to.len()];
        self.pending = true;
        // SAFETY: pinned; not written before `free` has waited, nor freed before `drop` has.
        let sent = unsafe { device.stream.start_copy_in(from, to) };
        sent.and_then(|()| device.stream.record(&self.copied)).map_err(|failed| {
            // nothing tells when the copy is over
            let _ = device.stream.synchronize();
            error(failed)
        })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // an error here was, or will be, told by the stream
        let _ = self.free();
    }
}

/// One projection on the device.
pub(super) struct Linear {
    weight: Buffer<u8>,
    float: Float,
    rows: usize,
    cols: usize,
    /// How the rows that it multiplies are quantised.
    pub(super) input: Option<RowQuantiser>,
}

impl Linear {
    /// Output features.
    pub(super) fn features(&self) -> usize {
        self.rows
    }

    /// Its numbers.
    pub(super) fn weight(&self) -> Result<Rows<'_>> {
        Rows::of_bytes(self.weight.view(), self.float, self.rows, self.cols).map_err(error)
    }
}

impl<'a> Upload<'a> {
    /// `total` projections are expected.
    pub(super) fn new(
        device: &'a Device,
        pool: &'a dyn ThreadPool,
        progress: &'a mut (dyn FnMut(Progress) + Send),
        total: usize,
    ) -> Result<Self> {
        let staging = [Staging::new(device)?, Staging::new(device)?];
        let scratch = vec![Vec::new(); pool.threads()];
        Ok(Self { device, pool, staging, next: 0, scratch, progress, done: 0, total })
    }

    /// One projection of all experts, `[experts, N, K]`, without biases: floats as they are stored,
    /// everything else decoded to f32. `beside` are to be of the same type.
    pub(super) fn experts(&mut self, matrices: &[Matrix], beside: &[Matrix]) -> Result<Stored> {
        let float = float_of(matrices.iter().chain(beside));
        let element = match float {
            FloatType::F32 => Element::F32,
            FloatType::F16 => Element::F16,
            FloatType::Bf16 => Element::Bf16,
        };
        let [rows, cols] = shape(matrices)?;
        let codes = Bytes::new(self.matrices(matrices, float)?);
        Ok(Stored::floats(element, codes, matrices.len(), rows, cols))
    }

    /// One projection of all experts in the format that Hopper's kernels read: floats, or codes row by
    /// row with the scales that they have.
    ///
    /// # Errors
    /// [`Error::NoKernel`] naming the expert that is stored in another way.
    pub(super) fn native(&mut self, matrices: &[Matrix], format: Sm90) -> Result<Stored> {
        let (element, scales, zero) = format.stored();
        let Some((scale, block)) = scales else { return self.experts(matrices, &[]) };
        let [rows, cols] = shape(matrices)?;
        let bits = element.bits();
        let row_bytes = cols * bits / 8;
        let mut to = self.buffer(matrices.len() * rows * row_bytes)?;
        let mut all_scales = Vec::new();
        let nan = AtomicBool::new(false);
        for (e, matrix) in matrices.iter().enumerate() {
            let native = Native::new(matrix, format)
                .map_err(|why| Error::NoKernel(format!("{format:?}: expert {e}: {why}")))?;
            native.scales(scale, block, &mut all_scales);
            self.rows(rows, row_bytes, &mut to, e * rows, |row, codes, to| {
                codes.resize(cols.div_ceil(4), 0.0);
                let codes: &mut [u8] = &mut cast_slice_mut(codes)[..cols];
                native.row(row, codes);
                match bits {
                    4 => {
                        let pairs = codes.as_chunks::<2>().0.iter().zip(to);
                        pairs.for_each(|([low, high], to)| *to = low | high << 4);
                    }
                    _ => {
                        if codes.iter().any(|code| code & 0x7f == 0x7f) {
                            nan.store(true, Ordering::Relaxed);
                        }
                        to.copy_from_slice(codes);
                    }
                }
            })?;
            // unpacked without a look at what is no number
            let wrong = match scale {
                _ if nan.load(Ordering::Relaxed) => Some("a weight that is NaN"),
                ScaleType::E8m0 if all_scales.iter().any(|scale| *scale > 192) => {
                    Some("a scale above 2^65")
                }
                _ => None,
            };
            if let Some(wrong) = wrong {
                return Err(Error::NoKernel(format!("{format:?}: expert {e} has {wrong}")));
            }
            self.step();
        }
        let scales = Buffer::from_slice(&self.device.stream, &all_scales, "scales");
        let codes = Bytes::new(to);
        Ok(Stored {
            element,
            expert_bytes: rows * row_bytes,
            scales: Some(Scales {
                scale,
                bytes: Bytes::new(scales.map_err(error)?),
                rows: block[0],
                cols: block[1],
                expert_bytes: all_scales.len() / matrices.len(),
            }),
            zero,
            ..Stored::floats(element, codes, matrices.len(), rows, cols)
        })
    }

    /// One projection.
    pub(super) fn linear(&mut self, matrix: &Matrix) -> Result<Linear> {
        let float = float_of([matrix].into_iter());
        Ok(Linear {
            weight: self.matrices(std::slice::from_ref(matrix), float)?,
            float: cuda_float(float),
            rows: matrix.rows(),
            cols: matrix.cols(),
            input: quantiser(&matrix.input)?,
        })
    }

    /// Vectors, one after another.
    pub(super) fn vector(&self, values: &[f32]) -> Result<Buffer<f32>> {
        Buffer::from_slice(&self.device.stream, values, "weights").map_err(error)
    }

    /// Ids.
    pub(super) fn ids(&self, values: &[u32]) -> Result<Buffer<u32>> {
        Buffer::from_slice(&self.device.stream, values, "routing tables").map_err(error)
    }

    fn matrices(&mut self, matrices: &[Matrix], float: FloatType) -> Result<Buffer<u8>> {
        let [rows, cols] = shape(matrices)?;
        let row_bytes = cols * float.size();
        let mut to = self.buffer(matrices.len() * rows * row_bytes)?;
        for (e, matrix) in matrices.iter().enumerate() {
            self.rows(rows, row_bytes, &mut to, e * rows, |row, scratch, to| {
                scratch.resize(cols, 0.0);
                matrix.decode_row(row, scratch);
                match float {
                    FloatType::F32 => to.copy_from_slice(cast_slice(scratch)),
                    FloatType::F16 => float16::f32_to_f16_bytes(scratch, to),
                    FloatType::Bf16 => float16::f32_to_bf16_bytes(scratch, to),
                }
            })?;
            self.step();
        }
        Ok(to)
    }

    fn buffer(&self, bytes: usize) -> Result<Buffer<u8>> {
        Buffer::new(&self.device.gpu, bytes, "weights").map_err(error)
    }

    /// A projection is done.
    fn step(&mut self) {
        self.done += 1;
        (self.progress)(Progress { done: self.done.min(self.total), total: self.total });
    }

    /// Rows of `row_bytes` bytes that `write` yields by their numbers, on all threads, to `to` from row
    /// `at` on. `write` has scratch of its thread's own.
    fn rows(
        &mut self,
        rows: usize,
        row_bytes: usize,
        to: &mut Buffer<u8>,
        at: usize,
        write: impl Fn(usize, &mut Vec<f32>, &mut [u8]) + Sync,
    ) -> Result<()> {
        if row_bytes > STAGING * size_of::<f32>() {
            return Err(Error::NoKernel(format!("rows of {row_bytes} bytes are too long")));
        }
        let together = (STAGING * size_of::<f32>() / row_bytes).max(1);
        for first in (0..rows).step_by(together) {
            let count = together.min(rows - first);
            let staging = &mut self.staging[self.next];
            let staged = &mut staging.free()?[..count * row_bytes];
            let items = staged.chunks_exact_mut(row_bytes).zip(first..);
            for_each_with(self.pool, self.scratch.iter_mut(), items, |scratch, (to, row)| {
                write(row, scratch, to);
            });
            let begin = (at + first) * row_bytes;
            let part = to.view_mut().part(begin..begin + count * row_bytes);
            staging.send(self.device, part)?;
            self.next ^= 1;
        }
        Ok(())
    }
}

/// Codes and scales of a matrix, where they are such as Hopper's kernels read.
struct Native<'a> {
    view: &'a View,
    codes: &'a Codes,
    /// Signed codes, to be shifted to unsigned ones.
    shift: u8,
}

impl<'a> Native<'a> {
    fn new(matrix: &'a Matrix, format: Sm90) -> Result<Self, String> {
        let (element, scales, zero) = format.stored();
        let view = matrix.view();
        let (Some(codes), Some((scale, block))) = (view.codes(), scales) else {
            return Err("it has no codes with scales".into());
        };
        if codes.group_of().is_some() {
            return Err("its columns are not in order (act-order)".into());
        }
        if codes.global().is_some() {
            return Err("it has a scale for the whole tensor".into());
        }
        let (stored, found) = (codes.scales(), codes.element());
        let same = stored.stored() == scale_type(scale)
            // f32 holds what the other types of scales hold
            || scale == ScaleType::F32 && stored.stored() != StoredScale::E4m3;
        if stored.block() != block || !same {
            let (is, of) = (stored.stored(), stored.block());
            return Err(format!("its scales are {is} for each {} × {}", of[0], of[1]));
        }
        let middle = match codes.zeros() {
            Zeros::None => 0.0,
            Zeros::Same(zero) => f32::from(*zero),
            Zeros::Each(_) => return Err("it has zero points".into()),
            Zeros::Minima(_) => return Err("its groups have least values".into()),
        };
        let shift = match (element, found) {
            (Element::E4m3, StoredElement::E4m3) | (Element::E2m1, StoredElement::E2m1) => 0,
            (Element::Uint4, StoredElement::Uint4) => 0,
            (Element::Uint4, StoredElement::Int4) => 8,
            _ => return Err(format!("its codes are {found:?}")),
        };
        if middle + f32::from(shift) != zero {
            return Err(format!("its zero point is {middle}"));
        }
        let [down, across] = block;
        let aligned = down == 1
            || view.step() == 1 && view.rows() > 0 && view.stored_row(0).is_multiple_of(down);
        if !aligned || !view.stored_cols().start.is_multiple_of(across) {
            return Err("it is a part of a matrix that begins inside a block".into());
        }
        Ok(Self { view, codes, shift })
    }

    /// The codes of a row, one to a byte.
    fn row(&self, row: usize, codes: &mut [u8]) {
        self.codes.codes(self.view.stored_row(row), self.view.stored_cols(), codes);
        if self.shift != 0 {
            codes.iter_mut().for_each(|code| *code ^= self.shift);
        }
    }

    /// Adds the scales, block by block, in the type that the device has them in.
    fn scales(&self, scale: ScaleType, [down, across]: [usize; 2], to: &mut Vec<u8>) {
        let scales = self.codes.scales();
        let first = self.view.stored_cols().start / across;
        for row in (0..self.view.rows()).step_by(down) {
            let row = self.view.stored_row(row);
            for group in first..first + self.view.cols().div_ceil(across) {
                match scale {
                    ScaleType::F32 => to.extend(scales.get(row, group).to_le_bytes()),
                    _ => to.extend_from_slice(scales.get_bytes(row, group)),
                }
            }
        }
    }
}

fn scale_type(scale: ScaleType) -> StoredScale {
    match scale {
        ScaleType::F32 => StoredScale::F32,
        ScaleType::F16 => StoredScale::F16,
        ScaleType::Bf16 => StoredScale::Bf16,
        ScaleType::E8m0 => StoredScale::E8m0,
        ScaleType::E4m3 => StoredScale::E4m3,
    }
}

/// The shape that all of `matrices` have.
fn shape(matrices: &[Matrix]) -> Result<[usize; 2]> {
    let of = |matrix: &Matrix| [matrix.rows(), matrix.cols()];
    let Some(first) = matrices.first().map(of) else {
        return Err(Error::NoKernel("a layer without experts".into()));
    };
    match matrices.iter().all(|matrix| of(matrix) == first) && !first.contains(&0) {
        true => Ok(first),
        false => Err(Error::NoKernel("the experts have different shapes".into())),
    }
}

/// The float type that all of them are stored in; f32 if they are not, or are no floats.
fn float_of<'a>(mut matrices: impl Iterator<Item = &'a Matrix>) -> FloatType {
    let of = |matrix: &Matrix| match matrix.format() {
        WeightFormat::F16 => FloatType::F16,
        WeightFormat::Bf16 => FloatType::Bf16,
        _ => FloatType::F32,
    };
    let first = matrices.next().map_or(FloatType::F32, of);
    match matrices.all(|matrix| of(matrix) == first) {
        true => first,
        false => FloatType::F32,
    }
}

pub(super) fn cuda_float(float: FloatType) -> Float {
    match float {
        FloatType::F32 => Float::F32,
        FloatType::F16 => Float::F16,
        FloatType::Bf16 => Float::Bf16,
    }
}

/// How rows are quantised, each by itself; `None`: not at all.
pub(super) fn quantiser(input: &ActivationQuant) -> Result<Option<RowQuantiser>> {
    let ActivationQuant::Quantised(qdq) = input else { return Ok(None) };
    Ok(Some(match *qdq {
        Qdq::Fp8Static { scale } => RowQuantiser::Fp8Static(scale),
        Qdq::Fp8Tensor => RowQuantiser::Fp8Row,
        Qdq::Fp8Token => RowQuantiser::Fp8Token,
        Qdq::Fp8Group { size, scale } => {
            RowQuantiser::Fp8Group { size, power_of_two: scale == GroupScale::PowerOfTwo }
        }
        Qdq::Int8Static { scale } => RowQuantiser::Int8Static(scale),
        Qdq::Int8Tensor | Qdq::Int8Token => RowQuantiser::Int8Token,
        Qdq::Int8Group { size } => RowQuantiser::Int8Group { size },
        Qdq::Mxfp8(_) | Qdq::Mxfp6(_) | Qdq::Mxfp4 | Qdq::Nvfp4 { .. } | Qdq::Nvfp4Token { .. } => {
            return Err(Error::NoKernel(format!(
                "no GPU kernel quantises rows to {}",
                input.format()
            )));
        }
    }))
}

/// How the rows of all experts are quantised, and each one's scale where that is given.
pub(super) fn quantisers<'a>(
    inputs: impl Iterator<Item = &'a ActivationQuant>,
) -> Result<Option<(RowQuantiser, Option<Vec<f32>>)>> {
    let mut scales = Vec::new();
    let mut all: Option<Option<RowQuantiser>> = None;
    for input in inputs {
        let mut one = quantiser(input)?;
        if let Some(RowQuantiser::Fp8Static(scale) | RowQuantiser::Int8Static(scale)) = &mut one {
            scales.push(std::mem::replace(scale, 1.0));
        }
        if *all.get_or_insert(one) != one {
            return Err(Error::NoKernel("the experts quantise their rows differently".into()));
        }
    }
    let scales = (!scales.is_empty()).then_some(scales);
    Ok(all.flatten().map(|quantiser| (quantiser, scales)))
}

/// The norm as kernels take it, without a factor.
pub(super) fn norm(norm: RmsNorm) -> Norm {
    let RmsNorm { eps, unit_offset, scale_first } = norm;
    Norm { eps, unit_offset, scale_first, factor: 1.0 }
}
