//! The weights of the routed experts on the device, as checkpoints store them.

use std::sync::Arc;

pub use moe_kernels::activation::Activation;

use crate::memory::Pod;
use crate::module::Argument;
use crate::{Buffer, Error, Gpu, Result};

/// What a weight's codes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// 32-bit floats.
    F32,
    /// Half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// FP8 E4M3 (`fn`: no infinities).
    E4m3,
    /// FP8 E5M2.
    E5m2,
    /// Signed bytes.
    Int8,
    /// Unsigned bytes, with a zero point.
    Uint8,
    /// Unsigned nibbles, low first, with a zero point.
    Uint4,
    /// FP4 E2M1, nibbles, low first.
    E2m1,
}

impl Element {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::E4m3,
        Self::E5m2,
        Self::Int8,
        Self::Uint8,
        Self::Uint4,
        Self::E2m1,
    ];

    /// Bits of one code.
    pub fn bits(self) -> usize {
        match self {
            Self::F32 => 32,
            Self::F16 | Self::Bf16 => 16,
            Self::E4m3 | Self::E5m2 | Self::Int8 | Self::Uint8 => 8,
            Self::Uint4 | Self::E2m1 => 4,
        }
    }

    pub(crate) fn options(self) -> Vec<String> {
        vec![format!("-DELEMENT={}", self as u32)]
    }
}

/// What a scale is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleType {
    /// 32-bit floats.
    F32,
    /// Half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Powers of two.
    E8m0,
    /// FP8 E4M3.
    E4m3,
}

impl ScaleType {
    /// Bytes of one scale.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::E8m0 | Self::E4m3 => 1,
        }
    }
}

/// Bytes on the device, from an offset on; several matrices may share a buffer.
#[derive(Clone, Debug)]
pub struct Bytes {
    buffer: Arc<Buffer<u8>>,
    offset: usize,
}

impl Bytes {
    /// All of a buffer.
    pub fn new(buffer: Buffer<u8>) -> Self {
        Self { buffer: Arc::new(buffer), offset: 0 }
    }

    /// The same buffer, `by` bytes further.
    ///
    /// # Panics
    /// If that is beyond its end.
    pub fn skip(&self, by: usize) -> Self {
        assert!(by <= self.len(), "{by} of {} bytes", self.len());
        Self { buffer: Arc::clone(&self.buffer), offset: self.offset + by }
    }

    /// Bytes from here on.
    pub fn len(&self) -> usize {
        self.buffer.len() - self.offset
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn pointer(&self) -> u64 {
        self.buffer.view().pointer + self.offset as u64
    }
}

/// Scales of a matrix: one for each block of `rows × cols` values, `[experts, ⌈N/rows⌉, ⌈K/cols⌉]`.
#[derive(Clone, Debug)]
pub struct Scales {
    /// What they are.
    pub scale: ScaleType,
    /// The scales.
    pub bytes: Bytes,
    /// Rows that share a scale: 1 for channels and groups, N for a whole matrix.
    pub rows: usize,
    /// Columns that share a scale: K for channels and a whole matrix.
    pub cols: usize,
    /// Bytes from one expert's scales to the next one's; those of two matrices may alternate.
    pub expert_bytes: usize,
}

/// One projection of all experts, `[experts, N, K]`, as stored. A value is
/// `(code − zero) · scale · global`, rounded once to f32.
#[derive(Clone, Debug)]
pub struct Stored {
    /// What the codes are.
    pub element: Element,
    /// Number of experts.
    pub experts: usize,
    /// N: output features.
    pub rows: usize,
    /// K: input features.
    pub cols: usize,
    /// The codes: rows without gaps, K · bits of an expert's row beside each other.
    pub codes: Bytes,
    /// Bytes from one expert's codes to the next one's; gate and up may alternate.
    pub expert_bytes: usize,
    /// Scales; none for plain floats.
    pub scales: Option<Scales>,
    /// Zero point of all codes; 8 for symmetric INT4, 128 for symmetric unsigned INT8.
    pub zero: f32,
    /// A zero point for each scale, laid out as the scales (in bytes: one each), in place of `zero`.
    pub zeros: Option<Bytes>,
    /// `[experts]`: multiplies the scales (NVFP4).
    pub global: Option<Arc<Buffer<f32>>>,
    /// `[experts, N]`.
    pub bias: Option<Arc<Buffer<f32>>>,
}

impl Stored {
    /// A matrix of plain floats, without scales or bias, experts one after another.
    pub fn floats(
        element: Element,
        codes: Bytes,
        experts: usize,
        rows: usize,
        cols: usize,
    ) -> Self {
        Self {
            element,
            experts,
            rows,
            cols,
            codes,
            expert_bytes: rows * cols * element.bits() / 8,
            scales: None,
            zero: 0.0,
            zeros: None,
            global: None,
            bias: None,
        }
    }

    /// Bytes of one row's codes.
    pub fn row_bytes(&self) -> usize {
        (self.cols * self.element.bits()).div_ceil(8)
    }

    fn check(&self, what: &'static str) -> Result<()> {
        let refuse = |reason: String| Err(Error::input(what, reason));
        if self.experts == 0
            || self.rows == 0
            || self.cols == 0
            || self.rows.max(self.cols) > 1 << 24
        {
            return refuse(format!("[{}, {}, {}]", self.experts, self.rows, self.cols));
        }
        let codes = (self.experts - 1) * self.expert_bytes + self.rows * self.row_bytes();
        if self.codes.len() < codes {
            return refuse(format!("{} bytes of codes; {codes} are needed", self.codes.len()));
        }
        let align = (self.element.bits() / 8).max(1);
        if !(self.codes.pointer() as usize).is_multiple_of(align)
            || !self.expert_bytes.is_multiple_of(align)
        {
            return refuse("the codes are not aligned".into());
        }
        if let Some(scales) = &self.scales {
            if scales.rows == 0
                || scales.cols == 0
                || !scales.expert_bytes.is_multiple_of(scales.scale.bytes())
            {
                return refuse(format!("scales of blocks [{}, {}]", scales.rows, scales.cols));
            }
            let count = self.rows.div_ceil(scales.rows) * self.cols.div_ceil(scales.cols);
            let bytes = (self.experts - 1) * scales.expert_bytes + count * scales.scale.bytes();
            if scales.bytes.len() < bytes {
                return refuse(format!(
                    "{} bytes of scales; {bytes} are needed",
                    scales.bytes.len()
                ));
            }
            let zeros = (self.experts - 1) * scales.expert_bytes / scales.scale.bytes() + count;
            if self.zeros.as_ref().is_some_and(|z| z.len() < zeros) {
                return refuse(format!("fewer than {zeros} zero points"));
            }
        } else if self.zeros.is_some() {
            return refuse("zero points without scales".into());
        }
        if self.global.as_ref().is_some_and(|global| global.len() != self.experts) {
            return refuse("not one global scale an expert".into());
        }
        if self.bias.as_ref().is_some_and(|bias| bias.len() != self.experts * self.rows) {
            return refuse("the bias is not [experts, N]".into());
        }
        Ok(())
    }

    pub(crate) fn raw(&self) -> RawStored {
        let scales = self.scales.as_ref();
        RawStored {
            codes: self.codes.pointer(),
            scales: scales.map_or(0, |s| s.bytes.pointer()),
            zeros: self.zeros.as_ref().map_or(0, Bytes::pointer),
            global: self.global.as_ref().map_or(0, |g| g.view().pointer),
            bias: self.bias.as_ref().map_or(0, |b| b.view().pointer),
            expert_bytes: self.expert_bytes as u64,
            row_bytes: self.row_bytes() as u64,
            expert_scales: scales.map_or(0, |s| s.expert_bytes / s.scale.bytes()) as u64,
            rows: self.rows as u32,
            cols: self.cols as u32,
            scale_type: scales.map_or(0, |s| s.scale as u32),
            group_rows: scales.map_or(1, |s| s.rows) as u32,
            group_cols: scales.map_or(1, |s| s.cols) as u32,
            row_scales: scales.map_or(0, |s| self.cols.div_ceil(s.cols)) as u32,
            zero: self.zero,
            padding: 0,
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RawStored {
    codes: u64,
    scales: u64,
    zeros: u64,
    global: u64,
    bias: u64,
    expert_bytes: u64,
    row_bytes: u64,
    expert_scales: u64,
    rows: u32,
    cols: u32,
    scale_type: u32,
    group_rows: u32,
    group_cols: u32,
    row_scales: u32,
    zero: f32,
    padding: u32,
}

// SAFETY: `struct Stored` of stored.cuh.
unsafe impl Argument for RawStored {}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RawActivation {
    pub(crate) kind: u32,
    gated: u32,
    a: f32,
    b: f32,
    c: f32,
}

// SAFETY: `struct Activation` of common.cuh.
unsafe impl Argument for RawActivation {}

impl RawActivation {
    /// `gated`: there is a gate projection.
    pub(crate) fn new(activation: Activation, gated: bool) -> RawActivation {
        let (kind, a, b, c) = match activation {
            Activation::Silu => (0, 0.0, 0.0, 0.0),
            Activation::Gelu => (1, 0.0, 0.0, 0.0),
            Activation::GeluTanh => (2, 0.0, 0.0, 0.0),
            Activation::Relu => (3, 0.0, 0.0, 0.0),
            Activation::Relu2 => (4, 0.0, 0.0, 0.0),
            Activation::ClampedSwiglu { alpha, beta, limit } => (5, alpha, beta, limit),
            Activation::SwigluStep { limit } => (6, limit, 0.0, 0.0),
            Activation::Situ { beta, lambda } => (7, beta, lambda.unwrap_or(0.0), 0.0),
        };
        RawActivation { kind, gated: u32::from(gated), a, b, c }
    }
}

/// An array with a part for every expert: where the first one's is, how far apart they are, and how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertArray {
    /// Device pointer of the first expert's part.
    pub address: u64,
    /// Bytes from one expert's part to the next one's.
    pub step: usize,
    /// Bytes of a part.
    pub bytes: usize,
}

impl ExpertArray {
    /// Of a buffer with the parts of so many experts, one after another.
    pub fn of<T: Pod>(buffer: &Buffer<T>, experts: usize) -> Self {
        let bytes = buffer.len() * size_of::<T>() / experts.max(1);
        Self { address: buffer.view().pointer, step: bytes, bytes }
    }
}

impl Stored {
    /// Bytes of an expert's codes, and of its scales.
    fn bytes_of_one(&self) -> (usize, usize) {
        let scales = self.scales.as_ref().map_or(0, |scales| {
            let count = self.rows.div_ceil(scales.rows) * self.cols.div_ceil(scales.cols);
            count * scales.scale.bytes()
        });
        (self.rows * self.row_bytes(), scales)
    }

    /// Its arrays; none of codes and scales that somebody has packed.
    fn arrays(&self) -> Vec<ExpertArray> {
        let (codes, of_scales) = self.bytes_of_one();
        let mut arrays = Vec::new();
        let mut add = |bytes: &Bytes, step: usize, of_one: usize| {
            if !bytes.is_empty() {
                arrays.push(ExpertArray { address: bytes.pointer(), step, bytes: of_one });
            }
        };
        add(&self.codes, self.expert_bytes, codes);
        if let Some(scales) = &self.scales {
            add(&scales.bytes, scales.expert_bytes, of_scales);
            let width = scales.scale.bytes();
            if let Some(zeros) = &self.zeros {
                add(zeros, scales.expert_bytes / width, of_scales / width);
            }
        }
        let floats = [&self.global, &self.bias].into_iter().flatten();
        arrays.extend(floats.map(|floats| ExpertArray::of(floats, self.experts)));
        arrays
    }

    /// The same arrays for so many experts, holding anything.
    fn with_room(&self, gpu: &Gpu, experts: usize) -> Result<Self> {
        let (codes, of_scales) = self.bytes_of_one();
        let room = |bytes: &Bytes, of_one: usize| {
            let len = if bytes.is_empty() { 0 } else { experts * of_one };
            Ok::<_, Error>(Bytes::new(Buffer::new(gpu, len, "moved weights")?))
        };
        let floats = |floats: &Option<Arc<Buffer<f32>>>| {
            let len = |floats: &Arc<Buffer<f32>>| floats.len() / self.experts * experts;
            let room = |floats| Buffer::new(gpu, len(floats), "moved weights").map(Arc::new);
            floats.as_ref().map(room).transpose()
        };
        let scales = self.scales.as_ref().map(|scales| {
            let bytes = room(&scales.bytes, of_scales)?;
            Ok::<_, Error>(Scales { bytes, expert_bytes: of_scales, ..scales.clone() })
        });
        let width = self.scales.as_ref().map_or(1, |scales| scales.scale.bytes());
        let zeros = self.zeros.as_ref().map(|zeros| room(zeros, of_scales / width));
        Ok(Self {
            experts,
            codes: room(&self.codes, codes)?,
            expert_bytes: codes,
            scales: scales.transpose()?,
            zeros: zeros.transpose()?,
            global: floats(&self.global)?,
            bias: floats(&self.bias)?,
            ..self.clone()
        })
    }
}

/// The three projections of all experts.
#[derive(Clone, Debug)]
pub struct ExpertWeights {
    /// `[experts, I, H]`; none for experts without a gate projection.
    pub gate: Option<Stored>,
    /// `[experts, I, H]`.
    pub up: Stored,
    /// `[experts, H, I]`.
    pub down: Stored,
    /// Between the products.
    pub activation: Activation,
}

impl ExpertWeights {
    /// An error unless the projections fit each other and their bytes.
    pub(crate) fn check(&self) -> Result<()> {
        self.up.check("up projection")?;
        self.down.check("down projection")?;
        if let Some(gate) = &self.gate {
            gate.check("gate projection")?;
            let shape = |m: &Stored| (m.experts, m.rows, m.cols, m.element);
            if shape(gate) != shape(&self.up) {
                return Err(Error::input("gate projection", "not as the up projection"));
            }
        }
        let (up, down) = (&self.up, &self.down);
        if (down.experts, down.rows, down.cols) != (up.experts, up.cols, up.rows) {
            let shape = format!("[{}, {}, {}]", down.experts, down.rows, down.cols);
            return Err(Error::input(
                "down projection",
                format!("{shape} does not fit the up projection"),
            ));
        }
        Ok(())
    }

    /// What these weights are, without their codes and scales, which somebody has packed.
    pub(crate) fn packed(mut self, gpu: &Gpu) -> Result<Self> {
        let nothing = Bytes::new(Buffer::new(gpu, 0, "nothing")?);
        for matrix in self.gate.iter_mut().chain([&mut self.up, &mut self.down]) {
            matrix.codes = nothing.clone();
            if let Some(scales) = &mut matrix.scales {
                scales.bytes = nothing.clone();
            }
        }
        Ok(self)
    }

    /// Their arrays.
    pub(crate) fn arrays(&self) -> Vec<ExpertArray> {
        let projections = self.gate.iter().chain([&self.up, &self.down]);
        projections.flat_map(Stored::arrays).collect()
    }

    /// The same arrays for so many experts, holding anything.
    pub(crate) fn with_room(&self, gpu: &Gpu, experts: usize) -> Result<Self> {
        let gate = self.gate.as_ref().map(|gate| gate.with_room(gpu, experts));
        Ok(Self {
            gate: gate.transpose()?,
            up: self.up.with_room(gpu, experts)?,
            down: self.down.with_room(gpu, experts)?,
            activation: self.activation,
        })
    }

    /// H: width of the rows.
    pub fn hidden(&self) -> usize {
        self.up.cols
    }

    /// I: width between the products.
    pub fn intermediate(&self) -> usize {
        self.up.rows
    }
}
