//! What the tests of kernels share: a GPU, or the reason why there is none; numbers; the error.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]

pub mod experts;

use std::path::PathBuf;

use moe_cuda::{Buffer, Compiler, Gpu, Modules, Pod, Stream, Verbs, View};

/// A GPU with everything loaded.
pub struct Setup {
    pub stream: Stream,
    pub modules: Modules,
    pub verbs: Verbs,
}

/// The first GPU, or nothing, and the reason printed. A machine that shows a GPU must run the tests:
/// there, anything that is missing is a failure.
pub fn setup() -> Option<Setup> {
    let gpu = match Gpu::new(0) {
        Ok(gpu) => gpu,
        Err(reason) => {
            println!("skipped, no GPU here: {reason}");
            return None;
        }
    };
    let compiler = compiler().expect("a GPU is here, but no compiler");
    let stream = Stream::new(&gpu).unwrap();
    let modules = Modules::new(&gpu, compiler, Modules::user_cache());
    let verbs = Verbs::new(&modules).unwrap();
    Some(Setup { stream, modules, verbs })
}

/// NVRTC: at `$NVRTC`, or where the loader finds it.
pub fn compiler() -> moe_cuda::Result<Compiler> {
    let path = std::env::var_os("NVRTC").map(PathBuf::from);
    Compiler::open(path.as_deref())
}

impl Setup {
    pub fn gpu(&self) -> &Gpu {
        self.modules.gpu()
    }

    pub fn upload<T: Pod>(&self, values: &[T]) -> Buffer<T> {
        Buffer::from_slice(&self.stream, values, "a test").unwrap()
    }

    pub fn buffer<T: Pod>(&self, len: usize) -> Buffer<T> {
        let mut buffer = Buffer::new(self.gpu(), len, "a test").unwrap();
        // NaN in every float type: what nobody wrote is seen.
        self.stream.fill(buffer.view_mut(), 0xff).unwrap();
        buffer
    }

    pub fn download<T: Pod + Default>(&self, view: View<'_, T>) -> Vec<T> {
        let mut values = vec![T::default(); view.len()];
        self.stream.copy_out(view, &mut values).unwrap();
        values
    }
}

/// Numbers that look random and are the same everywhere (splitmix64).
pub struct Numbers(pub u64);

impl Numbers {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// Uniform in ±1.
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn units(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit()).collect()
    }

    /// k different ids below `n`.
    pub fn distinct(&mut self, k: usize, n: usize) -> Vec<u32> {
        let mut ids: Vec<u32> = (0..n as u32).collect();
        for i in 0..k {
            let j = i + self.below(n - i);
            ids.swap(i, j);
        }
        ids.truncate(k);
        ids
    }
}

/// ‖y − r‖² / ‖r‖².
pub fn nmse(y: &[f32], r: &[f64]) -> f64 {
    assert_eq!(y.len(), r.len());
    let error: f64 = y.iter().zip(r).map(|(y, r)| (f64::from(*y) - r).powi(2)).sum();
    let norm: f64 = r.iter().map(|r| r * r).sum();
    if error == 0.0 { 0.0 } else { error / norm }
}

pub fn bf16(values: &[f32]) -> Vec<u16> {
    values.iter().map(|&x| half::bf16::from_f32(x).to_bits()).collect()
}

pub fn from_bf16(bits: &[u16]) -> Vec<f32> {
    bits.iter().map(|&b| half::bf16::from_bits(b).to_f32()).collect()
}

pub fn f16(values: &[f32]) -> Vec<u16> {
    values.iter().map(|&x| half::f16::from_f32(x).to_bits()).collect()
}

/// Numbers as bytes, as a checkpoint has them.
pub fn bytes<T: Pod>(values: &[T]) -> Vec<u8> {
    // SAFETY: plain numbers, read as the bytes they are.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }.to_vec()
}
