//! Rows in the GPU's own memory: nothing waits, nothing is allocated, and a pass can be captured.

use moe_cuda::{Buffer, Gpu, Stream};
use moe_runner::experts::StreamOrder;
use moe_runner::hidden::ActivationDtype::Bf16;
use moe_runner::hidden::{DeviceRouting, DeviceRows, DeviceRowsMut, Rows, RowsMut};
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface};
use moe_runner::spec::LayerSpec;
use moe_runner::weights::{FloatType, random_layer};

use crate::layers::{forward, plain, rows, shared};
use crate::{gpu, runner};

/// Rows of bf16 on the GPU, `stride` elements apart.
pub(crate) struct OnDevice {
    pub(crate) stream: Stream,
    memory: Buffer<u16>,
    shape: [usize; 2],
    stride: usize,
}

impl OnDevice {
    pub(crate) fn new(runner: &MoeRunner, shape: [usize; 2], stride: usize) -> Self {
        let gpu = Gpu::new(0).unwrap();
        // SAFETY: the runner's stream, which lives as long as the runner.
        let stream = unsafe { Stream::from_raw(&gpu, runner.stream().unwrap()) };
        let mut memory = Buffer::new(&gpu, shape[0] * stride, "a test").unwrap();
        stream.fill(memory.view_mut(), 0x7f).unwrap();
        Self { stream, memory, shape, stride }
    }

    pub(crate) fn write(&mut self, values: &[f32]) {
        let [_, cols] = self.shape;
        for (row, values) in values.chunks(cols).enumerate() {
            let bits: Vec<u16> =
                values.iter().map(|v| half::bf16::from_f32(*v).to_bits()).collect();
            let at = row * self.stride;
            self.stream.copy_in(&bits, self.memory.view_mut().part(at..at + cols)).unwrap();
        }
    }

    pub(crate) fn read(&self) -> Vec<f32> {
        let mut bits = vec![0u16; self.memory.len()];
        self.stream.copy_out(self.memory.view(), &mut bits).unwrap();
        let rows = bits.chunks(self.stride).flat_map(|row| &row[..self.shape[1]]);
        rows.map(|bits| half::bf16::from_bits(*bits).to_f32()).collect()
    }

    pub(crate) fn rows(&self) -> Rows<'_> {
        let address = self.memory.view().address();
        // SAFETY: the memory holds these rows, and outlives what is done with them.
        let rows = unsafe { DeviceRows::new(address, Bf16, self.shape, self.stride) };
        Rows::Device(rows.unwrap())
    }

    pub(crate) fn rows_mut(&mut self) -> RowsMut<'_> {
        let address = self.memory.view_mut().address();
        // SAFETY: as above, and nothing else uses them meanwhile.
        let rows = unsafe { DeviceRowsMut::new(address, Bf16, self.shape, self.stride) };
        RowsMut::Device(rows.unwrap())
    }
}

fn spec() -> LayerSpec {
    LayerSpec { shared: Some(shared()), ..plain() }
}

#[test]
fn rows_of_the_gpu_give_the_bits_of_rows_of_the_host() {
    let _alone = crate::alone();
    let Some(options) = gpu(Bf16) else { return };
    let layer = random_layer(&spec(), FloatType::Bf16, 9).unwrap();
    let mut runner = runner(&layer, &options);
    let hidden = rows(Bf16, 33, 48, 5);
    let want: Vec<f32> = forward(&mut runner, &hidden).iter().map(|v| Bf16.round(*v)).collect();
    for stride in [48, 56] {
        let mut x = OnDevice::new(&runner, [33, 48], stride);
        let mut y = OnDevice::new(&runner, [33, 48], stride);
        x.write(&hidden);
        runner.forward(&ForwardInput::new(x.rows()), y.rows_mut()).unwrap();
        runner.synchronize().unwrap();
        assert_eq!(y.read(), want);
        // and from one to the other
        let mut host = vec![0.0; hidden.len()];
        runner.forward(&ForwardInput::new(x.rows()), RowsMut::F32(&mut host)).unwrap();
        host.iter_mut().for_each(|v| *v = Bf16.round(*v));
        assert_eq!(host, want);
    }
}

/// An engine's own stream: rows are written, the pass made and the output read in order, also as a graph of that stream.
#[test]
fn a_pass_between_the_work_of_another_stream() {
    let _alone = crate::alone();
    let Some(options) = gpu(Bf16) else { return };
    let layer = random_layer(&spec(), FloatType::Bf16, 9).unwrap();
    let mut runner = runner(&layer, &options);
    let (tokens, width) = (700, 48);
    let hidden = rows(Bf16, tokens, width, 5);
    let want: Vec<f32> = forward(&mut runner, &hidden).iter().map(|v| Bf16.round(*v)).collect();
    let mut given = OnDevice::new(&runner, [tokens, width], width);
    let mut x = OnDevice::new(&runner, [tokens, width], width);
    let mut y = OnDevice::new(&runner, [tokens, width], width);
    let mut out = OnDevice::new(&runner, [tokens, width], width);
    given.write(&hidden);
    let own = Stream::new(&Gpu::new(0).unwrap()).unwrap();
    let mut pass = || {
        // long enough that a pass which does not wait comes too early
        for _ in 0..50 {
            own.copy(out.memory.view(), x.memory.view_mut())?;
        }
        own.copy(given.memory.view(), x.memory.view_mut())?;
        // SAFETY: a stream of the runner's GPU.
        unsafe { runner.order(own.as_raw(), StreamOrder::PassesWait) }.unwrap();
        runner.forward(&ForwardInput::new(x.rows()), y.rows_mut()).unwrap();
        // SAFETY: as above.
        unsafe { runner.order(own.as_raw(), StreamOrder::PassesFirst) }.unwrap();
        own.copy(y.memory.view(), out.memory.view_mut())
    };
    pass().unwrap();
    let graph = own.capture(&mut pass).unwrap();
    own.synchronize().unwrap();
    assert_eq!(out.read(), want);
    own.fill(y.memory.view_mut(), 0).unwrap();
    own.fill(out.memory.view_mut(), 0).unwrap();
    // SAFETY: rows, weights and working memory are as they were captured.
    unsafe { own.replay(&graph) }.unwrap();
    own.synchronize().unwrap();
    assert_eq!(out.read(), want);
}

/// Routing that an engine has finished on the GPU, ids and weights, gives the bits of the same from the
/// host; with rows of the GPU nothing waits, and the pass can be captured.
#[test]
fn routing_that_was_finished_on_the_gpu() {
    let _alone = crate::alone();
    let Some(options) = gpu(Bf16) else { return };
    let layer = random_layer(&spec(), FloatType::Bf16, 9).unwrap();
    let mut runner = runner(&layer, &options);
    let hidden = rows(Bf16, 5, 48, 5);
    let ids = [0, 7, -1, 2, 5, 9, 1, 0, 4, i32::MIN, 3, 3, 2, -7, 6];
    let weights: Vec<f32> = (0..15).map(|i| 0.1 * i as f32 - 0.3).collect();
    let mut want = vec![0.0; hidden.len()];
    let input = ForwardInput::routed(Rows::F32(&hidden), &ids, &weights);
    runner.forward(&input, RowsMut::F32(&mut want)).unwrap();
    want.iter_mut().for_each(|v| *v = Bf16.round(*v));
    let (mut x, mut y) = (OnDevice::new(&runner, [5, 48], 48), OnDevice::new(&runner, [5, 48], 48));
    x.write(&hidden);
    let ids = Buffer::from_slice(&x.stream, &ids, "a test").unwrap();
    let weights = Buffer::from_slice(&x.stream, &weights, "a test").unwrap();
    let (ids, weights) = (ids.view().address(), weights.view().address());
    // SAFETY: both hold as many, and outlive the passes.
    let routing = unsafe { DeviceRouting::new(ids, weights, [5, 3]) }.unwrap();
    let input = ForwardInput { device_routing: Some(routing), ..ForwardInput::new(x.rows()) };
    let graph = x
        .stream
        .capture(|| {
            runner.forward(&input, y.rows_mut()).unwrap();
            Ok(())
        })
        .unwrap();
    // SAFETY: rows, routing, weights and working memory are as they were captured.
    unsafe { x.stream.replay(&graph) }.unwrap();
    assert_eq!(y.read(), want);
    let short = ForwardInput { hidden: Rows::F32(&hidden[48..]), ..input };
    let error = runner.forward(&short, RowsMut::F32(&mut vec![0.0; 192])).unwrap_err();
    assert_eq!(error.to_string(), "routing: it is for 5 tokens, there are 4");
}

/// What is wrong with rows of the GPU is told when it is asked for, once.
#[test]
fn a_fault_stays_until_it_is_read() {
    let _alone = crate::alone();
    let Some(options) = gpu(Bf16) else { return };
    let layer = random_layer(&spec(), FloatType::Bf16, 9).unwrap();
    let mut runner = runner(&layer, &options);
    let good = rows(Bf16, 3, 48, 5);
    let mut bad = good.clone();
    bad[48 + 5] = f32::NAN;
    let (mut x, mut y) = (OnDevice::new(&runner, [3, 48], 48), OnDevice::new(&runner, [3, 48], 48));
    x.write(&bad);
    runner.forward(&ForwardInput::new(x.rows()), y.rows_mut()).unwrap();
    x.write(&good);
    runner.forward(&ForwardInput::new(x.rows()), y.rows_mut()).unwrap();
    let error = runner.synchronize().unwrap_err().to_string();
    assert_eq!(error, "hidden_states: row 1, column 5: NaN is not a finite number");
    runner.synchronize().unwrap();
}

/// A captured pass computes what is in the rows when it is replayed: other rows, and so other routing.
/// Nothing in a pass may wait or allocate: a capture would refuse both.
#[test]
fn a_pass_is_captured_and_replayed_with_other_rows_and_routing() {
    let _alone = crate::alone();
    let Some(options) = gpu(Bf16) else { return };
    let layer = random_layer(&spec(), FloatType::Bf16, 9).unwrap();
    let mut runner = runner(&layer, &options);
    for tokens in [1, 40] {
        runner.reserve(tokens, 2).unwrap();
        let (mut x, mut y) =
            (OnDevice::new(&runner, [tokens, 48], 48), OnDevice::new(&runner, [tokens, 48], 48));
        // SAFETY: the runner's stream, which lives as long as the runner.
        let stream = unsafe { Stream::from_raw(&Gpu::new(0).unwrap(), runner.stream().unwrap()) };
        stream.synchronize().unwrap();
        let graph = stream
            .capture(|| {
                runner.forward(&ForwardInput::new(x.rows()), y.rows_mut()).unwrap();
                Ok(())
            })
            .unwrap();
        for seed in 0..3 {
            let hidden = rows(Bf16, tokens, 48, 20 + seed);
            x.write(&hidden);
            // SAFETY: rows, weights and working memory are as they were captured.
            unsafe { stream.replay(&graph) }.unwrap();
            let replayed = y.read();
            // after the replay: another pass uses the same working memory
            let want: Vec<f32> =
                forward(&mut runner, &hidden).iter().map(|v| Bf16.round(*v)).collect();
            assert_eq!(replayed, want, "T={tokens}, seed {seed}");
        }
    }
}
