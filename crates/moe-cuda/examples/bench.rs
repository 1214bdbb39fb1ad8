//! Times the experts of published shapes beside the floor that this GPU's memory and arithmetic set.
//!
//! ```console
//! $ cargo run --release -p moe-cuda --example bench -- few qwen3 int4 1 4 16
//! $ cargo run --release -p moe-cuda --example bench -- many mixtral bf16 1024 4096
//! $ cargo run --release -p moe-cuda --example bench -- gated qwen3 int4 1 4
//! ```
//!
//! Routing is given and balanced, weights and rows are random. A time is the median of replays of a
//! graph that holds several calls with rows and routing of their own (at one token over different
//! experts), divided by the calls, so that weights come from memory and not from the cache. The error is
//! ‖y − r‖/‖r‖ against the f32 experts on the same stored weights. `gated` is `few` behind a gate with random
//! weights and plain softmax routing, in the same launch.

use moe_cuda::router::{Renormalise, Router, RouterOptions, RouterTensors, RoutingMut};
use moe_cuda::weights::{Activation, Bytes, Element, ScaleType, Scales, Stored};
use moe_cuda::{
    Buffer, Compiler, Event, ExpertWeights, FaultWord, FewBatch, FewExperts, FewGate, FewShape,
    FewWorkspace, Float, Gpu, GroupedExperts, Launch, ManyExperts, Modules, Plan, Rows, RowsMut,
    Source, Stream, Verbs,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Name, hidden, intermediate, experts, top-k.
const SHAPES: [(&str, usize, usize, usize, usize); 4] = [
    ("mixtral", 4096, 14336, 8, 2),
    ("qwen3", 2048, 768, 128, 8),
    ("dsv3", 7168, 2048, 256, 8),
    ("gptoss", 2880, 2880, 128, 4),
];

static PROBE: Source = Source {
    name: "bench",
    text: r#"
typedef unsigned int u32;
typedef unsigned long long u64;
__device__ u32 mix(u32 a) {
  a ^= a >> 16; a *= 0x7feb352du; a ^= a >> 15; a *= 0x846ca68bu; return a ^ a >> 16;
}
// kind 0: bf16 in +-scale; 1: E4M3 codes, none NaN; 2: any bits; 3: f32 in [scale, 2 scale];
// 4: E8M0 around 2^-7; 5: bf16 in [scale, 2 scale]
extern "C" __global__ void fill(u32* p, u64 words, u32 kind, float scale, u32 seed) {
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += (u64)gridDim.x * blockDim.x) {
    u32 r = mix((u32)i ^ mix(seed + (u32)(i >> 32)));
    if (kind == 0 || kind == 5) {
      u32 v[2];
      for (int h = 0; h < 2; h++) {
        float u = ((r >> 16 * h & 0xffff) - 32768.f) / 32768.f;
        float x = kind == 0 ? u * scale : scale * (1.5f + 0.5f * u);
        v[h] = __float_as_uint(x) + 0x8000u >> 16;
      }
      r = v[0] | v[1] << 16;
    }
    if (kind == 1)
      for (int b = 0; b < 32; b += 8)
        if ((r >> b & 0x7f) == 0x7f) r ^= 8u << b;
    if (kind == 3) r = __float_as_uint(scale * (1.f + (r >> 8) / 16777216.f));
    if (kind == 4) r = 0x76767676u + (r & 0x03030303u);
    p[i] = r;
  }
}
extern "C" __global__ void read(const uint4* p, u64 n, u32* out) {
  u32 a = 0;
  u64 step = (u64)gridDim.x * blockDim.x, i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  for (; i + 7 * step < n; i += 8 * step) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; j++)
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v[j].x), "=r"(v[j].y), "=r"(v[j].z), "=r"(v[j].w) : "l"(p + i + j * step));
#pragma unroll
    for (int j = 0; j < 8; j++) a ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (a == 0x12345u) *out = a;
}
"#,
    headers: &[],
};

struct Bench {
    stream: Stream,
    modules: Modules,
    verbs: Verbs,
    /// GB/s of a stream that only reads.
    read: f64,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let gpu = Gpu::new(0)?;
    let stream = Stream::new(&gpu)?;
    let modules = Modules::new(&gpu, Compiler::open(None)?, Modules::user_cache());
    let verbs = Verbs::new(&modules)?;
    let mut bench = Bench { stream, modules, verbs, read: 0.0 };
    bench.limits()?;
    for job in args.split(|arg| arg == ",") {
        if let [kernel, shape, format, tokens @ ..] = job {
            let tokens = tokens.iter().map(|t| Ok(t.parse()?)).collect::<Result<Vec<usize>>>()?;
            if let Err(error) = bench.layer(kernel, shape, format, &tokens) {
                println!("{}: {error}", job.join(" "));
            }
        }
    }
    Ok(())
}

/// The median.
fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

impl Bench {
    fn gpu(&self) -> &Gpu {
        self.modules.gpu()
    }

    fn buffer<T: moe_cuda::Pod>(&self, len: usize) -> Result<Buffer<T>> {
        Ok(Buffer::new(self.gpu(), len, "the benchmark")?)
    }

    /// Median microseconds of `work`, by events.
    fn time(&self, repeats: usize, mut work: impl FnMut() -> moe_cuda::Result<()>) -> Result<f64> {
        let (begin, end) = (Event::new(self.gpu())?, Event::new(self.gpu())?);
        let mut times = Vec::new();
        for turn in 0..repeats + 3 {
            self.stream.record(&begin)?;
            work()?;
            self.stream.record(&end)?;
            self.stream.synchronize()?;
            if turn >= 3 {
                times.push(end.microseconds_since(&begin)?);
            }
        }
        Ok(median(times))
    }

    fn limits(&mut self) -> Result<()> {
        let bytes = 2usize << 30;
        let (mut a, mut b) = (self.buffer::<u8>(bytes)?, self.buffer::<u8>(bytes)?);
        self.fill(&mut a, 2, 0.0)?;
        let copy = self.time(10, || self.stream.copy(a.view(), b.view_mut()))?;
        let read = self.modules.function(&PROBE, &[], "read")?;
        let mut out = self.buffer::<u32>(1)?;
        let (from, n, to) = (a.view().address(), bytes as u64 / 16, out.view_mut().address());
        let blocks = 8 * self.gpu().properties().multiprocessors as u32;
        let reading = self.time(20, || {
            // SAFETY: the parameters of `read`; the buffer has that many pieces of 16 bytes.
            unsafe { read.launch(&self.stream, Launch::plain(blocks, 512), &[&from, &n, &to]) }
        })?;
        self.read = bytes as f64 / reading / 1e3;
        println!(
            "{:?}; copy {:.0} GB/s (read and write), read {:.0} GB/s",
            self.gpu(),
            2.0 * bytes as f64 / copy / 1e3,
            self.read
        );
        Ok(())
    }

    fn fill(&self, buffer: &mut Buffer<u8>, kind: u32, scale: f32) -> Result<()> {
        let fill = self.modules.function(&PROBE, &[], "fill")?;
        let (words, seed) = (buffer.len() as u64 / 4, buffer.len() as u32 ^ kind);
        let address = buffer.view_mut().address();
        // SAFETY: the parameters of `fill`; the buffer has that many words.
        Ok(unsafe {
            fill.launch(
                &self.stream,
                Launch::plain(4096, 256),
                &[&address, &words, &kind, &scale, &seed],
            )
        }?)
    }

    /// A random projection.
    fn stored(&self, format: &str, experts: usize, rows: usize, cols: usize) -> Result<Stored> {
        let spread = 1.5 / (cols as f32).sqrt();
        let count = experts * rows * cols;
        let bytes = |len: usize, kind, scale| -> Result<Bytes> {
            let mut buffer = self.buffer::<u8>(len)?;
            self.fill(&mut buffer, kind, scale)?;
            Ok(Bytes::new(buffer))
        };
        let scaled =
            |stored, scale: ScaleType, block: (usize, usize), kind, value| -> Result<Stored> {
                let per_expert = rows.div_ceil(block.0) * cols.div_ceil(block.1) * scale.bytes();
                let scales = Scales {
                    scale,
                    bytes: bytes((experts * per_expert).next_multiple_of(4), kind, value)?,
                    rows: block.0,
                    cols: block.1,
                    expert_bytes: per_expert,
                };
                Ok(Stored { scales: Some(scales), ..stored })
            };
        let plain = |element: Element, kind| -> Result<Stored> {
            let codes = bytes(count * element.bits() / 8, kind, spread)?;
            Ok(Stored::floats(element, codes, experts, rows, cols))
        };
        match format {
            "bf16" => plain(Element::Bf16, 0),
            "fp8" => {
                scaled(plain(Element::E4m3, 1)?, ScaleType::F32, (128, 128), 3, spread / 100.0)
            }
            "int4" => {
                let stored = Stored { zero: 8.0, ..plain(Element::Uint4, 2)? };
                scaled(stored, ScaleType::Bf16, (1, 128), 5, spread / 8.0)
            }
            "mxfp4" => scaled(plain(Element::E2m1, 2)?, ScaleType::E8m0, (1, 32), 4, 0.0),
            _ => Err(format!("{format} is none of bf16, fp8, int4, mxfp4").into()),
        }
    }

    fn layer(&self, kernel: &str, shape: &str, format: &str, all_tokens: &[usize]) -> Result<()> {
        let (_, hidden, inner, experts, top_k) =
            *SHAPES.iter().find(|s| s.0 == shape).ok_or("no such shape")?;
        let weights = ExpertWeights {
            gate: Some(self.stored(format, experts, inner, hidden)?),
            up: self.stored(format, experts, inner, hidden)?,
            down: self.stored(format, experts, hidden, inner)?,
            activation: Activation::Silu,
        };
        let bits = match format {
            "bf16" => 16.0,
            "fp8" => 8.0 + 32.0 / 16384.0,
            "int4" => 4.0 + 16.0 / 128.0,
            _ => 4.0 + 8.0 / 32.0,
        };
        let expert_bytes = 3.0 * (hidden * inner) as f64 * bits / 8.0;
        let most = *all_tokens.iter().max().ok_or("no number of tokens")?;
        let calls = |tokens| {
            if tokens <= 16 {
                16
            } else if tokens <= 256 {
                8
            } else {
                2
            }
        };
        let rows = all_tokens.iter().map(|&t| t * calls(t)).max().unwrap_or(0);
        let mut x = self.buffer::<u8>(rows * hidden * 2)?;
        self.fill(&mut x, 0, 1.0)?;
        let mut out = self.buffer::<u16>(rows * hidden)?;
        let mut fault = FaultWord::new(self.gpu(), &self.stream)?;

        let slots = most * top_k;
        enum Fast {
            Few(Box<FewExperts>, FewWorkspace),
            Gated(Box<FewExperts>, FewWorkspace, Box<Router>),
            Many(Box<ManyExperts>, Box<moe_cuda::ManyWorkspace>),
        }
        let gated = kernel.strip_prefix("gated");
        let (mut fast, tile, name) = if let Some(shape) = gated.or(kernel.strip_prefix("few")) {
            let few = match shape.strip_prefix('=') {
                // few=WARPS.RECORDS.STAGES.BLOCKS.SPLIT
                Some(numbers) => {
                    let n = numbers
                        .split('.')
                        .map(str::parse)
                        .collect::<std::result::Result<Vec<usize>, _>>()?;
                    let [warps, records, stages, blocks, split] = n[..] else {
                        return Err("five numbers".into());
                    };
                    let shape = FewShape { warps, records, stages, blocks, split };
                    FewExperts::with_shape(&self.modules, &self.stream, weights.clone(), shape)?
                }
                None => FewExperts::new(&self.modules, &self.stream, weights.clone())?,
            };
            let s = few.shape();
            let name = if gated.is_some() { "gated" } else { "few" };
            let name =
                format!("{name} {}.{}.{}.{}.{}", s.warps, s.records, s.stages, s.blocks, s.split);
            let work = few.workspace(&self.stream, slots)?;
            let fast = if gated.is_some() {
                let options = RouterOptions::softmax(experts, top_k, Renormalise::Sum(0.0));
                let router = Router::new(&self.modules, options, RouterTensors::default())?;
                Fast::Gated(Box::new(few.with_gate(&self.modules, &router)?), work, router.into())
            } else {
                Fast::Few(Box::new(few), work)
            };
            (fast, FewExperts::TILE, name)
        } else {
            let many = ManyExperts::new(&self.modules, &self.stream, weights.clone())?;
            let work = many.workspace(&self.stream, slots)?;
            (Fast::Many(Box::new(many), Box::new(work)), ManyExperts::TILE, "many".to_owned())
        };
        let mut plan = Plan::new(self.gpu(), slots, experts, tile)?;
        let mut gate = self.buffer::<u8>(2 * experts * hidden)?;
        self.fill(&mut gate, 0, 1.0)?;
        let mut logits = self.buffer::<f32>(most * experts)?;
        let mut none = self.buffer::<f32>(0)?;
        for &tokens in all_tokens {
            let calls = calls(tokens);
            let (ids, mut all_distinct) = routing(tokens * calls, top_k, experts, tokens);
            let factors: Vec<f32> = (0..ids.len()).map(|i| 0.05 + (i % 13) as f32 / 50.0).collect();
            let mut ids = Buffer::from_slice(&self.stream, &ids, "ids")?;
            let mut factors = Buffer::from_slice(&self.stream, &factors, "weights")?;
            self.stream.fill(out.view_mut(), 0xff)?;
            let slots = tokens * top_k;
            let mut call = |c: usize| -> moe_cuda::Result<()> {
                let part = c * slots..(c + 1) * slots;
                let at = (c * tokens * hidden * 2) as u64;
                // SAFETY: both buffers have the rows of all calls.
                let (x, mut out) = unsafe {
                    (
                        Rows::from_raw(
                            x.view().address() + at,
                            Float::Bf16,
                            tokens,
                            hidden,
                            hidden,
                        )?,
                        RowsMut::from_raw(
                            out.view_mut().address() + at,
                            Float::Bf16,
                            tokens,
                            hidden,
                            hidden,
                        )?,
                    )
                };
                if let Fast::Gated(few, work, router) = &mut fast {
                    let gate = FewGate {
                        weight: Rows::of_bytes(gate.view(), Float::Bf16, experts, hidden)?,
                        bias: None,
                        router,
                        logits: logits.view_mut().part(0..tokens * experts),
                        routing: RoutingMut {
                            ids: ids.view_mut().part(part.clone()),
                            weights: factors.view_mut().part(part),
                            shared_weights: none.view_mut(),
                        },
                        fault: &fault,
                    };
                    return few.forward_gated(&self.stream, gate, (x, 1.0, &fault), work, &mut out);
                }
                let (ids, factors) = (ids.view().part(part.clone()), factors.view().part(part));
                let batch = FewBatch { x, ids, weights: factors, factor: 1.0, fault: &fault };
                match &mut fast {
                    Fast::Gated(..) => Ok(()),
                    Fast::Few(few, work) => {
                        if slots > FewExperts::OWN_PLAN {
                            self.verbs.plan(&self.stream, ids, top_k, &mut plan)?;
                        }
                        few.forward(&self.stream, &batch, Some(&plan), work, &mut out)
                    }
                    Fast::Many(many, work) => {
                        self.verbs.plan(&self.stream, ids, top_k, &mut plan)?;
                        many.forward(&self.stream, &batch, &plan, work, &mut out)
                    }
                }
            };
            call(0)?;
            self.stream.synchronize()?;
            let graph = self.stream.capture(|| (0..calls).try_for_each(&mut call))?;
            // SAFETY: all buffers live until the end of this function.
            let time = self.time(15, || unsafe { self.stream.replay(&graph) })? / calls as f64;
            fault.check(&self.stream)?;
            if gated.is_some() {
                let mut chosen = vec![0u32; calls * slots];
                self.stream.copy_out(ids.view(), &mut chosen)?;
                all_distinct = distinct(&chosen, slots, experts);
            }
            let error = if tokens <= 64 {
                let slots = tokens * top_k;
                let ids = ids.view().part(0..slots);
                let want = self.truth(&weights, &x, tokens, ids, factors.view().part(0..slots))?;
                let mut got = vec![0u16; tokens * hidden];
                self.stream.copy_out(out.view().part(0..tokens * hidden), &mut got)?;
                let wide = |b: u16| f64::from(f32::from_bits(u32::from(b) << 16));
                let pairs = || got.iter().map(|&b| wide(b)).zip(want.iter().map(|&w| f64::from(w)));
                let square = |v: f64| v * v;
                let difference: f64 = pairs().map(|(g, w)| square(g - w)).sum();
                let norm: f64 = pairs().map(|(_, w)| square(w)).sum();
                format!("error {:.1e}", (difference / norm).sqrt())
            } else {
                String::new()
            };
            let bytes = all_distinct / calls as f64 * expert_bytes + 4.0 * (tokens * hidden) as f64;
            let flops = 6.0 * (slots * hidden * inner) as f64;
            let peak = if format == "fp8" { 1463e6 } else { 782e6 };
            let floor = (bytes / self.read / 1e3).max(flops / peak);
            println!(
                "{shape:8} {format:5} T={tokens:<5} {name:18} {time:9.2} us, floor {floor:9.2}, ratio {:5.2}, {:6.0} GB/s, {:6.0} TFLOP/s, {:.1} experts {error}",
                time / floor,
                bytes / time / 1e3,
                flops / time / 1e6,
                all_distinct / calls as f64
            );
        }
        Ok(())
    }

    /// By the f32 experts.
    fn truth(
        &self,
        weights: &ExpertWeights,
        x: &Buffer<u8>,
        tokens: usize,
        ids: moe_cuda::View<'_, u32>,
        factors: moe_cuda::View<'_, f32>,
    ) -> Result<Vec<f32>> {
        let (hidden, inner, slots) = (weights.hidden(), weights.intermediate(), ids.len());
        let experts = GroupedExperts::new(&self.modules, weights.clone())?;
        let count = weights.up.experts;
        let mut plan = Plan::new(self.gpu(), slots, count, GroupedExperts::TILE)?;
        self.verbs.plan(&self.stream, ids, slots / tokens, &mut plan)?;
        let (mut h, mut y) =
            (self.buffer::<f32>(slots * inner)?, self.buffer::<f32>(slots * hidden)?);
        let mut out = self.buffer::<f32>(tokens * hidden)?;
        let fault = FaultWord::new(self.gpu(), &self.stream)?;
        // SAFETY: the buffer has at least as many rows.
        let x = unsafe { Rows::from_raw(x.view().address(), Float::Bf16, tokens, hidden, hidden)? };
        let mut h = RowsMut::new(h.view_mut(), Float::F32, slots, inner)?;
        let mut rows = RowsMut::new(y.view_mut(), Float::F32, slots, hidden)?;
        experts.first(&self.stream, x, &plan, None, &mut h)?;
        experts.second(&self.stream, h.as_rows(), &plan, &mut rows)?;
        let mut target = RowsMut::new(out.view_mut(), Float::F32, tokens, hidden)?;
        let y = rows.as_rows();
        self.verbs.combine(&self.stream, y, ids, Some(factors), count, 1.0, &mut target, &fault)?;
        let mut values = vec![0.0; tokens * hidden];
        self.stream.copy_out(out.view(), &mut values)?;
        Ok(values)
    }
}

/// Balanced random routing of `rows` rows, and the sum of distinct experts over calls of `tokens` rows.
/// Single tokens walk over all experts, so that no call finds weights of the last one in the cache.
fn routing(rows: usize, top_k: usize, experts: usize, tokens: usize) -> (Vec<u32>, f64) {
    let mut state = 0x1234_5678_9abc_def0u64 ^ tokens as u64;
    let mut below = |n: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    let mut order: Vec<u32> = (0..experts as u32).collect();
    let mut ids = Vec::with_capacity(rows * top_k);
    for row in 0..rows {
        let walks = tokens == 1 && !(row * top_k).is_multiple_of(experts);
        if !walks {
            for i in 0..experts {
                order.swap(i, i + below(experts - i));
            }
        }
        let at = if tokens == 1 { row * top_k % experts } else { 0 };
        ids.extend((0..top_k).map(|j| order[(at + j) % experts]));
    }
    let distinct = distinct(&ids, tokens * top_k, experts);
    (ids, distinct)
}

/// The sum over calls of `slots` slots of the experts that each meets.
fn distinct(ids: &[u32], slots: usize, experts: usize) -> f64 {
    let of_call = |ids: &[u32]| {
        let mut seen = vec![false; experts];
        ids.iter().for_each(|&id| seen[id as usize] = true);
        seen.iter().filter(|&&s| s).count()
    };
    ids.chunks(slots).map(of_call).sum::<usize>() as f64
}
