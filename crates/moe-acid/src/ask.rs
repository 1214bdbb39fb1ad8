//! How servers are asked over HTTP: what is sent, and where their answers hold log-probabilities.

use serde_json::{Value, json};

/// A kind of server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// vLLM: `/v1/completions` with `prompt_logprobs`.
    Vllm,
    /// SGLang: `/generate` with `top_logprobs_num`.
    Sglang,
    /// llama.cpp's `llama-server`: `/completion` with `n_probs`, a request for each probe.
    LlamaServer,
}

/// What is posted.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Behind the server's address.
    pub path: &'static str,
    /// JSON.
    pub body: Value,
}

/// A row for each probe, a log-probability for each token; `None`: not finite.
pub type Rows = Vec<Vec<Option<f64>>>;

impl Server {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Vllm, Self::Sglang, Self::LlamaServer];

    /// Its name, as the command takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
            Self::LlamaServer => "llama-server",
        }
    }

    /// The kind of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|server| server.name() == name)
    }

    /// Where it says its version: the path, and the key of the answer.
    pub fn version(self) -> (&'static str, &'static str) {
        match self {
            Self::Vllm => ("/version", "version"),
            Self::Sglang => ("/server_info", "version"),
            Self::LlamaServer => ("/props", "build_info"),
        }
    }

    /// What to post for the log-probabilities of all of `tokens` tokens after each token of `prompt`.
    pub fn requests(self, model: &str, prompt: &[u32], tokens: usize) -> Vec<Request> {
        // log-probabilities of a prompt stand at the tokens that they predict: one more token for
        // those after the last
        let longer: Vec<u32> = prompt.iter().chain(prompt.first()).copied().collect();
        match self {
            Self::Vllm => vec![Request {
                path: "/v1/completions",
                body: json!({
                    "model": model, "prompt": longer, "max_tokens": 1, "temperature": 0,
                    "prompt_logprobs": tokens,
                }),
            }],
            Self::Sglang => vec![Request {
                path: "/generate",
                body: json!({
                    "input_ids": longer, "return_logprob": true, "logprob_start_len": 0,
                    "top_logprobs_num": tokens,
                    "sampling_params": { "max_new_tokens": 1, "temperature": 0 },
                }),
            }],
            Self::LlamaServer => prompt
                .iter()
                .map(|token| Request {
                    path: "/completion",
                    body: json!({
                        "prompt": [token], "n_predict": 1, "n_probs": tokens, "temperature": 0,
                        "cache_prompt": false,
                    }),
                })
                .collect(),
        }
    }

    /// The rows in the answers to all [`requests`](Self::requests).
    ///
    /// # Errors
    /// What is missing, and what the server needs to be started with.
    pub fn rows(self, answers: &[Value], probes: usize, tokens: usize) -> Result<Rows, String> {
        let found: Vec<&Value> = match self {
            Self::Vllm => at(answers, "/choices/0/prompt_logprobs")?.iter().skip(1).collect(),
            Self::Sglang => at(answers, "/meta_info/input_top_logprobs")?.iter().skip(1).collect(),
            Self::LlamaServer => {
                let place = "/completion_probabilities/0/top_logprobs";
                let of = |answer: &'_ Value| answer.pointer(place).is_some();
                match answers.iter().position(|answer| !of(answer)) {
                    Some(probe) => return Err(format!("answer {probe} has nothing at {place}")),
                    None => answers.iter().filter_map(|answer| answer.pointer(place)).collect(),
                }
            }
        };
        if found.len() < probes {
            return Err(format!("there are {} positions, not {probes}", found.len()));
        }
        found[..probes].iter().map(|position| self.row(position, tokens)).collect()
    }

    fn row(self, position: &Value, tokens: usize) -> Result<Vec<Option<f64>>, String> {
        let pairs: Vec<(Option<u64>, Option<f64>)> = match (self, position) {
            (Self::Vllm, Value::Object(all)) => {
                all.iter().map(|(id, at)| (id.parse().ok(), at["logprob"].as_f64())).collect()
            }
            (Self::Sglang, Value::Array(all)) => {
                all.iter().map(|at| (at[1].as_u64(), at[0].as_f64())).collect()
            }
            (Self::LlamaServer, Value::Array(all)) => {
                all.iter().map(|at| (at["id"].as_u64(), at["logprob"].as_f64())).collect()
            }
            _ => return Err(format!("a position holds no log-probabilities: {position}")),
        };
        let mut row = vec![None; tokens];
        let mut known = vec![false; tokens];
        for (id, value) in pairs {
            if let Some(at) = id.and_then(|id| usize::try_from(id).ok()).filter(|id| *id < tokens) {
                (row[at], known[at]) = (value.filter(|v| v.is_finite()), true);
            }
        }
        match known.iter().filter(|known| **known).count() {
            all if all == tokens => Ok(row),
            some => Err(format!(
                "log-probabilities of {some} tokens came, not of all {tokens}{}",
                match self {
                    Self::Vllm => format!("; start vLLM with --max-logprobs {tokens}"),
                    Self::Sglang | Self::LlamaServer => String::new(),
                }
            )),
        }
    }
}

fn at<'a>(answers: &'a [Value], place: &str) -> Result<&'a Vec<Value>, String> {
    let found = answers.first().and_then(|answer| answer.pointer(place)).and_then(Value::as_array);
    found.ok_or_else(|| format!("the answer has no list at {place}"))
}
