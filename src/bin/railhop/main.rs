//! The `railhop` command.

mod bench;
#[cfg(target_os = "linux")]
mod doctor;
mod inputs;
#[cfg(target_os = "linux")]
mod launch;
mod meeting;
mod nccl;
mod options;
mod plan;
mod replay;
mod world;

use std::error::Error;
use std::io::{self, IsTerminal};
use std::panic;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// Expert-parallel all-to-all for mixture-of-experts models
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = false)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Sends recorded routing through plan, dispatch, test experts and combine, and checks every bit
    Replay(replay::ReplayArgs),
    /// Measures plan, dispatch and combine on uniform random routing
    Bench(bench::BenchArgs),
    /// Derives the budget of a world (blocks, channels, chunks, rings) from its rows and its machine, with reasons
    Plan(plan::PlanArgs),
    /// Starts a world of processes on this machine, each "node" in a network of its own if wanted
    #[cfg(target_os = "linux")]
    Launch(launch::LaunchArgs),
    /// Says what is here, what is missing, and what to do about it
    #[cfg(target_os = "linux")]
    Doctor(doctor::DoctorArgs),
}

impl Command {
    /// The code to exit with.
    fn run(&self) -> Result<ExitCode, Box<dyn Error + Send + Sync>> {
        match self {
            Self::Replay(args) => replay::run(args)?,
            Self::Bench(args) => bench::run(args)?,
            Self::Plan(args) => plan::run(args)?,
            #[cfg(target_os = "linux")]
            Self::Launch(args) => return launch::run(args),
            #[cfg(target_os = "linux")]
            Self::Doctor(args) => return doctor::run(args),
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn main() -> ExitCode {
    // A bug, wherever it shows: one line as for every other failure, and no thread is left waiting.
    panic::set_hook(Box::new(|bug| {
        complain(bug);
        std::process::exit(101);
    }));
    // Failures are reported once, by the line on stderr; what the library logs is for those who ask.
    let filter =
        EnvFilter::builder().with_env_var("RAILHOP_LOG").with_default_directive(LevelFilter::OFF.into());
    let logs = tracing_subscriber::fmt().with_env_filter(filter.from_env_lossy()).with_writer(io::stderr);
    // Launchers and files want no colours.
    let logs = if io::stderr().is_terminal() { logs } else { logs.with_ansi(false) };
    logs.init();
    match Cli::try_parse() {
        Ok(cli) => cli.command.run().unwrap_or_else(|failure| {
            complain(failure);
            ExitCode::FAILURE
        }),
        Err(usage) if usage.use_stderr() => {
            complain(first_paragraph(&usage.to_string()));
            ExitCode::from(2)
        }
        Err(help) => help.exit(),
    }
}

/// Says what went wrong, on one line of stderr.
fn complain(what: impl ToString) {
    let text = what.to_string();
    let words: Vec<_> = text.split_whitespace().collect();
    eprintln!("error: {}", words.join(" "));
}

/// The part of a usage error that says what is wrong; hints follow it.
fn first_paragraph(usage: &str) -> &str {
    let text = usage.split("\n\n").next().unwrap_or(usage);
    text.strip_prefix("error: ").unwrap_or(text)
}
