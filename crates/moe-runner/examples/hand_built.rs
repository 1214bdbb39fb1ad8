//! A layer without a checkpoint: weights from the program itself, experts chosen elsewhere, and the
//! work on threads of the program's own.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use moe_runner::hidden::{ActivationDtype, Rows, RowsMut};
use moe_runner::pool::{ThreadPool, Work, Worker};
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface, Options};
use moe_runner::spec::{
    Activation, Dims, ExpertSpec, GateSpec, LayerSpec, OutputSpec, RoutedScale, RouterSpec,
    ScaleOn, Transform,
};
use moe_runner::weights::{Expert, LoadedLayer, Matrix, OutputWeights};

const HIDDEN: usize = 8;
const EXPERTS: usize = 4;

/// Threads of the program, here made for each region; an engine would hand the items to its own.
struct OwnPool(usize);

impl ThreadPool for OwnPool {
    fn threads(&self) -> usize {
        self.0
    }

    fn run(&self, items: usize, work: Work<'_>) {
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for worker in 0..self.0 {
                let next = &next;
                scope.spawn(move || {
                    loop {
                        match next.fetch_add(1, Ordering::Relaxed) {
                            item if item < items => work(Worker::new(worker), item),
                            _ => return,
                        }
                    }
                });
            }
        });
    }
}

/// Expert e returns e + 1 times its row, of which relu keeps what is positive.
fn expert(e: usize) -> moe_runner::Result<Expert> {
    let diagonal = |value: f32| {
        let values: Vec<f32> = (0..HIDDEN * HIDDEN)
            .map(|i| if i / HIDDEN == i % HIDDEN { value } else { 0.0 })
            .collect();
        Matrix::from_f32(&values, [HIDDEN, HIDDEN])
    };
    Ok(Expert {
        gate: None,
        up: diagonal(1.0)?,
        down: diagonal(e as f32 + 1.0)?,
        gate_bias: None,
        up_bias: None,
        down_bias: None,
        norm: None,
    })
}

fn main() -> moe_runner::Result<()> {
    let layer = LoadedLayer {
        spec: LayerSpec {
            name: "by hand".into(),
            index: 0,
            dims: Dims { hidden: HIDDEN, routed_hidden: HIDDEN, intermediate: HIDDEN },
            gate: GateSpec::default(),
            router: RouterSpec::softmax(EXPERTS, 2, true),
            expert: ExpertSpec {
                gated: false,
                activation: Activation::Relu,
                bias: false,
                norm: None,
            },
            input_transform: Transform::default(),
            output_transform: Transform::default(),
            routed_scale: RoutedScale { factor: 1.0, on: ScaleOn::Weights },
            shared: None,
            output: OutputSpec::default(),
        },
        // the experts are chosen below
        gate: None,
        experts: (0..EXPERTS).map(expert).collect::<Result<_, _>>()?,
        input_transform: Vec::new(),
        output_transform: Vec::new(),
        shared: None,
        output: OutputWeights::default(),
    };
    let options = Options { pool: Arc::new(OwnPool(2)), ..Options::new(ActivationDtype::F32, 1)? };
    let mut runner = MoeRunner::new(layer.ready(&options)?);

    // token 0 goes to experts 0 and 3, token 1 to experts 1 and 2
    let hidden: Vec<f32> = (0..2 * HIDDEN).map(|i| i as f32 - 4.0).collect();
    let (ids, weights) = ([0, 3, 1, 2], [0.5, 0.5, 0.25, 0.75]);
    let mut output = vec![0.0f32; hidden.len()];
    let input = ForwardInput::routed(Rows::F32(&hidden), &ids, &weights);
    runner.forward(&input, RowsMut::F32(&mut output))?;

    // 0.5 · 1 + 0.5 · 4, and 0.25 · 2 + 0.75 · 3
    let factors = [2.5, 2.75];
    for (t, (row, x)) in output.chunks(HIDDEN).zip(hidden.chunks(HIDDEN)).enumerate() {
        println!("token {t}: {row:?}");
        assert!(row.iter().zip(x).all(|(y, x)| *y == x.max(0.0) * factors[t]), "{row:?}");
    }
    Ok(())
}
