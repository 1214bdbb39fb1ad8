//! Pseudo-random numbers for simulated routing and synthetic layers: the same on every machine.

/// A stream of numbers (SplitMix64: Steele, Lea & Flood 2014): 64 bits of state, every seed as good
/// as any other.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Uniform in (0, 1): 53 bits, shifted off zero so that a logarithm is finite.
    pub fn unit(&mut self) -> f64 {
        ((self.bits() >> 11) as f64 + 0.5) * (-53_f64).exp2()
    }

    /// N(0, 1), by Box and Muller.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * self.unit().ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Uniform in ±`bound`.
    pub fn symmetric(&mut self, bound: f32) -> f32 {
        // 24 bits: every value is an f32
        ((self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0) * bound
    }

    /// `len` values, uniform in ±`bound`.
    pub fn values(&mut self, len: usize, bound: f32) -> Vec<f32> {
        (0..len).map(|_| self.symmetric(bound)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::Random;

    /// The first outputs for seed 0, as published with the reference implementation.
    #[test]
    fn splitmix64_vectors() {
        let mut random = Random::new(0);
        let expected = [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4, 0x06c4_5d18_8009_454f];
        assert_eq!(expected.map(|_| random.bits()), expected);
    }
}
