//! `acid ask`: a running server.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use moe_acid::ReadingsFile;
use moe_acid::ask::Server;
use moe_runner::checkpoint::Checkpoint;
use serde::Deserialize;
use serde_json::Value;

use super::{Line, report};
use crate::failure::unusable;
use crate::outputs::{self, ensure_apart};
use crate::report::Report;

/// Seconds for a server to answer: the first request may compile kernels.
const PATIENCE: u64 = 600;

#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  moe-runner acid write ./acid --family mixtral --form bf16
  vllm serve ./acid/mixtral-bf16 --max-logprobs 100 &
  moe-runner acid ask ./acid/mixtral-bf16 --url http://localhost:8000")]
pub(super) struct AskArgs {
    /// The checkpoint that the server has, a folder of `acid write`.
    checkpoint: PathBuf,
    /// The server's address.
    #[arg(long, value_name = "URL")]
    url: String,
    /// Which server: vllm, sglang or llama-server.
    #[arg(long, value_name = "NAME", default_value = "vllm")]
    engine: String,
    /// The model's name there, where it has several.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Also write what the server said to this file, as `acid read` takes it.
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Show what was read at each probe, beside what is right.
    #[arg(long)]
    table: bool,
}

/// What is asked, in a folder of `acid write`.
const PROBES: &str = "probes.json";

/// Its content.
#[derive(Deserialize)]
struct Probes {
    family: String,
    form: String,
    prompt: Vec<u32>,
    tokens: usize,
}

pub(super) fn run(args: &AskArgs) -> Result<Report> {
    let server = Server::named(&args.engine).ok_or_else(|| {
        let known = Server::ALL.map(Server::name).join(", ");
        unusable(format!("--engine {}: there are {known}", args.engine))
    })?;
    let probes = probes(&args.checkpoint)?;
    if let Some(path) = &args.save {
        let read = args.checkpoint.join(PROBES);
        // a folder with the probes alone is enough to ask
        let checkpoint = Checkpoint::open_outline(&args.checkpoint).ok();
        ensure_apart(&[("--save", path)], &[("the probes", &read)], checkpoint.as_ref())?;
    }
    let url = args.url.trim_end_matches('/');
    if !url.starts_with("http://") {
        return Err(unusable(format!(
            "--url {url}: an address that begins with http:// is needed"
        )));
    }
    let model = match &args.model {
        Some(model) => model.clone(),
        None => get(url, "/v1/models")?
            .pointer("/data/0/id")
            .and_then(Value::as_str)
            .ok_or_else(|| anyhow!("{url} names no model; give --model"))?
            .to_string(),
    };
    let requests = server.requests(&model, &probes.prompt, probes.tokens);
    let answers = requests.iter().map(|request| post(url, request.path, &request.body));
    let answers: Vec<Value> = answers.collect::<Result<_>>()?;
    let rows = server
        .rows(&answers, probes.prompt.len(), probes.tokens)
        .map_err(|reason| anyhow!("{url}: {reason}"))?;
    let (path, key) = server.version();
    let version =
        get(url, path).ok().and_then(|answer| Some(answer.get(key)?.as_str()?.to_string()));
    let file = ReadingsFile {
        family: probes.family,
        engine: format!("{} {}, {}", server.name(), version.unwrap_or_default(), probes.form)
            .replace(" ,", ","),
        log_probabilities: rows,
    };
    if let Some(path) = &args.save {
        outputs::write(path, (serde_json::to_string(&file)? + "\n").as_bytes())?;
    }
    let (block, readings) = file.read().map_err(|reason| anyhow!("{url}: {reason}"))?;
    report(&[Line::new(file.engine, &block, &readings, args.table)])
}

fn probes(checkpoint: &Path) -> Result<Probes> {
    let path = checkpoint.join(PROBES);
    let text = fs::read(&path).with_context(|| {
        format!("{}: cannot be read; `acid write` makes such a folder", path.display())
    })?;
    serde_json::from_slice(&text)
        .with_context(|| format!("{}: is not what acid write wrote", path.display()))
}

fn get(url: &str, path: &str) -> Result<Value> {
    answer(url, path, minreq::get(format!("{url}{path}")))
}

fn post(url: &str, path: &str, body: &Value) -> Result<Value> {
    let request = minreq::post(format!("{url}{path}"))
        .with_header("Content-Type", "application/json")
        .with_body(body.to_string());
    answer(url, path, request)
}

/// The answer's JSON. A server that refuses is quoted.
fn answer(url: &str, path: &str, request: minreq::Request) -> Result<Value> {
    let answer = request
        .with_timeout(PATIENCE)
        .send()
        .with_context(|| format!("{url}{path}: the server does not answer"))?;
    let text = String::from_utf8_lossy(answer.as_bytes());
    let json: Value = serde_json::from_str(&text).unwrap_or_default();
    if answer.status_code == 200 && !json.is_null() {
        return Ok(json);
    }
    let said = ["/error/message", "/message", "/detail"].iter().find_map(|at| json.pointer(at));
    let said =
        said.map_or(text.to_string(), |said| said.as_str().map_or(said.to_string(), Into::into));
    Err(anyhow!("{url}{path}: the server refuses with status {}: {said}", answer.status_code))
}
