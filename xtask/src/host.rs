//! x
use std::path::Path;
pub(crate) fn up(_d: &Path) -> anyhow::Result<()> {
    Ok(())
}
pub(crate) fn down() -> anyhow::Result<()> {
    Ok(())
}
pub(crate) fn clean(_d: &Path) -> anyhow::Result<()> {
    Ok(())
}
